"""The same training under Hugging Face Accelerate, on any number of processes; the loss spans all of them.

accelerate launch --cpu --num_processes 2 examples/accelerate_loop.py
"""

import torch
from accelerate import Accelerator
from plain_pytorch import Encoders, caption, dataset, report
from torch.utils.data import DataLoader, TensorDataset

from meru_fast.distributed import scale_gradient

GLOBAL_BATCH = 128


def main(epochs: int = 20) -> None:
    torch.manual_seed(0)
    accelerator = Accelerator()
    processes = accelerator.num_processes
    pixels, labels = dataset()
    data = TensorDataset(pixels[:1400], labels[:1400])
    model = Encoders()
    batches = DataLoader(data, GLOBAL_BATCH // processes, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    prepared, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    group = torch.distributed.group.WORLD if processes > 1 else None

    for epoch in range(epochs):
        for images, targets in batches:
            image, text = prepared(images, [caption(label) for label in targets.tolist()])
            # The loss is global and so are its gradients; what DDP averages has to be a sum.
            image, text = scale_gradient(image, processes), scale_gradient(text, processes)
            loss = model.loss(image, text, group)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
        if epoch % 5 == 4:
            accelerator.print(f"epoch {epoch + 1:2d}  loss {loss.item():.3f}")
    if accelerator.is_main_process:
        report(model, pixels[1400:], labels[1400:])
    accelerator.end_training()


if __name__ == "__main__":
    main()
