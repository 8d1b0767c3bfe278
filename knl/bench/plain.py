"""A plain training script, as a user of torch writes it: `python plain.py RECIPE_FILE STEPS`.

Nothing of knl works here: torch's memory layout, its modules (which knl's networks fall back to in
that layout), its SGD, its threads. Writes {"step_s": seconds} a line as knl.tune.steps does.
"""

from __future__ import annotations

import json
import sys
import time

import torch
from torch import nn

from knl.config import load_recipe
from knl.models import build_model
from knl.profile import pixels_of


def main(recipe_file: str, steps: int) -> None:
    """Train `steps` steps after one that warms up."""
    recipe = load_recipe(recipe_file)
    batch, pixels = recipe.train.lane_batch, pixels_of(recipe)
    model = build_model(recipe.model, 3, recipe.data.classes)
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    criterion = nn.CrossEntropyLoss()
    images = torch.randn(batch, 3, pixels, pixels)
    labels = torch.randint(recipe.data.classes, (batch,))
    for _ in range(steps + 1):
        began = time.perf_counter()
        optimiser.zero_grad()
        loss = criterion(model(images), labels)
        loss.backward()
        optimiser.step()
        print(json.dumps({"step_s": time.perf_counter() - began}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
