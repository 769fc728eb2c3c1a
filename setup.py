"""Packaging of meru_fast.

The Triton kernels live in the top-level folder ``kernels/`` and the configs in ``configs/``, yet both install below
``meru_fast``: ``kernels`` is the import name of another distribution and must never be claimed here.
"""

from setuptools import find_namespace_packages, setup

MAPPED = {"meru_fast.kernels": "kernels", "meru_fast.configs": "configs"}

TORCH = ["torch>=2.11,<2.16", "triton>=3.6,<3.10; platform_system == 'Linux'"]
MODELS = [
    "numpy>=1.26",
    "torchvision>=0.26,<0.31",
    "timm>=1.0.20,<1.1",
    "omegaconf>=2.3,<2.5",
    "tokenizers>=0.20,<1",
    "ftfy>=6.1,<7",
    "regex>=2023.0",
    "safetensors>=0.4,<1",
    "huggingface_hub>=0.30,<3",
    "pillow>=10",
    "rich>=13",
]
EXTRAS = {
    "train": [
        "deepspeed>=0.19,<0.20",
        "webdataset>=1.0,<2",
        "braceexpand>=0.1.7,<1",
        "wordsegment>=1.3,<2",
        "tensorboard>=2.15,<3",
        "fsspec>=2024.1",
        "psutil>=5.9",
        "matplotlib>=3.8,<4",
    ],
    "dali": ["nvidia-dali-cuda130>=2.0,<3"],
    "xformers": ["xformers>=0.0.30"],
    "eval": [
        "scikit-learn>=1.4,<2",
        "scipy>=1.11",
        "matplotlib>=3.8,<4",
        "webdataset>=1.0,<2",
        "jinja2>=3.1,<4",
        "h5py>=3.10,<4",
    ],
    "bench": [
        "pytest>=8,<10",
        "pytest-benchmark>=5,<6",
        "pytest-timeout>=2.3,<3",
        "matplotlib>=3.8,<4",
        "psutil>=5.9",
    ],
    "peers": ["geoopt>=0.5,<0.6", "hypll>=0.1,<0.2", "inf-cl>=1.2,<2", "open_clip_torch>=3.3,<4"],
    "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.7,<10", "mkdocstrings[python]>=1,<2", "latex2mathml>=3.77,<4"],
    "examples": ["accelerate>=1.9,<2", "open_clip_torch>=3.3,<4", "scikit-learn>=1.4,<2", "webdataset>=1.0,<2"],
    "test": [
        "pytest>=8,<10",
        "pytest-benchmark>=5,<6",
        "pytest-cov>=5,<8",
        "pytest-timeout>=2.3,<3",
        "pytest-xdist>=3.6,<4",
        "hypothesis>=6.100,<7",
        "mpmath>=1.3,<2",
        "scikit-image>=0.24,<1",
        "moto[s3]>=5,<6",  # an S3 server on this machine
        "flask>=3,<4",
        "flask-cors>=5,<7",
        "s3fs>=2024.1",
        "build>=1.2,<2",
        "setuptools>=77",
        "ruff>=0.12,<0.18",
        "mypy>=1.14,<3",
    ],
}
# "peers" are other projects' losses, for side-by-side benchmarks only; nothing else needs them
EXTRAS["all"] = sorted({req for name, group in EXTRAS.items() if name != "peers" for req in group})


def packages() -> list[str]:
    # folders of data files count as packages too: setuptools wants every folder that it ships to be named
    found = find_namespace_packages(include=["meru_fast", "meru_fast.*"])
    for name, folder in MAPPED.items():
        found += [name] + [f"{name}.{inner}" for inner in find_namespace_packages(folder)]
    return found


setup(
    packages=packages(),
    package_dir={"meru_fast": "meru_fast", **MAPPED},
    package_data={
        "meru_fast": ["py.typed", "assets/**/*", "evaluation/templates/*"],
        "meru_fast.configs": ["**/*"],
        "meru_fast.kernels": ["*.csv"],
    },
    install_requires=TORCH + MODELS,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["meru-fast = meru_fast.cli:main"]},
)
