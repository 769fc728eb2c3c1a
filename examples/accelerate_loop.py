"""The same training under Hugging Face Accelerate, on any number of processes; the loss spans all of them.

accelerate launch --cpu --num_processes 2 examples/accelerate_loop.py
"""

import argparse

import torch
from accelerate import Accelerator
from plain_pytorch import Encoders
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from meru_fast import ops
from meru_fast.distributed import scale_gradient

GLOBAL_BATCH = 128


def main(epochs: int = 20) -> None:
    torch.manual_seed(0)
    accelerator = Accelerator()
    processes = accelerator.num_processes
    group = torch.distributed.group.WORLD if processes > 1 else None

    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target))
    training, held_out = data[:1400], data[1400:]
    model = Encoders()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    batches = DataLoader(TensorDataset(*training), GLOBAL_BATCH // processes, shuffle=True, drop_last=True)
    towers, optimizer, batches = accelerator.prepare(model, optimizer, batches)

    for epoch in range(epochs):
        for pixels, labels in batches:
            image, text, *scalars = towers(pixels, labels)
            # Gradients of the global loss are complete; DDP averages over ranks what has to be a sum.
            image, text = scale_gradient(image, processes), scale_gradient(text, processes)
            loss, _, _ = ops.meru_loss(image, text, *scalars, entail_weight=0.2, group=group)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
        if epoch % 5 == 4:
            accelerator.print(f"epoch {epoch + 1:2d}  loss {loss.item():.3f}")

    with torch.no_grad():
        image, text, image_alpha, text_alpha, curv, _ = model(held_out[0], torch.arange(10))
        image, text = ops.exp_map0(image, curv, scale=image_alpha), ops.exp_map0(text, curv, scale=text_alpha)
        accuracy = (ops.pairwise_inner(image, text, curv).argmax(1) == held_out[1]).float().mean()
    accelerator.print(f"zero-shot accuracy {accuracy:.1%}")
    accelerator.end_training()


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
