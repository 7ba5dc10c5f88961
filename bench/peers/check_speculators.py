"""Asks the `speculators` library for a place for every tensor of a draft folder in its layout.

    pip install speculators==0.9.0
    python3 bench/peers/check_speculators.py FOLDER...

FOLDER is what `draftsmith bundle export --format speculators` wrote. The library reads the configuration and builds the
network from it; names and shapes of the file must be those of the network, without those that the library itself leaves
out of a file (`_keys_to_ignore_on_save`, `_keys_to_ignore_on_load_missing`). Prints a line for each folder; ends with 1 if
one does not fit.
"""

import sys

from safetensors import safe_open
from speculators.config import SpeculatorModelConfig
from speculators.model import SpeculatorModel


def differences(folder: str) -> tuple[str, list[str]]:
    config = SpeculatorModelConfig.from_pretrained(folder)
    model = SpeculatorModel.registered_model_class_from_config(config)(config)
    own = {name: list(value.shape) for name, value in model.state_dict().items()}
    ignored = {*model._keys_to_ignore_on_save, *model._keys_to_ignore_on_load_missing}
    with safe_open(f"{folder}/model.safetensors", "pt") as file:
        found = {name: file.get_slice(name).get_shape() for name in file.keys()}
    wrong = [f"`{name}` has no place" for name in found if name not in own]
    wrong += [f"`{name}` is missing" for name in own if name not in found and name not in ignored]
    shapes = [(name, own[name], shape) for name, shape in found.items() if own.get(name, shape) != shape]
    wrong += [f"`{name}` is {shape}, the network has {wanted}" for name, wanted, shape in shapes]
    return f"{type(model).__name__}, {len(found)} tensors", wrong


def main() -> None:
    failed = False
    for folder in sys.argv[1:]:
        what, wrong = differences(folder)
        failed |= bool(wrong)
        print(f"{folder}: {what}: {'; '.join(wrong) or 'every one has its place'}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
