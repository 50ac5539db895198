"""Small reference networks, the user's own by import path, and weights to and from disk."""

from __future__ import annotations

import copy
import importlib
import inspect
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from art_rs_plugins.benchmark.files import write_atomic
from art_rs_plugins.smoothing.modules import BaseClassifier, Normalize
from art_rs_plugins.smoothing.noise import Key, Stage, standard_normal

__all__ = [
    "KNOWN",
    "ResNet",
    "build",
    "load_weights",
    "network_outputs",
    "read_training",
    "same_outputs",
    "save_weights",
]

_DEPTHS = {"resnet20": 20, "resnet56": 56, "resnet110": 110}
KNOWN = ("cnn", "mlp", *_DEPTHS)
"""Names that `build` knows."""


def _cnn(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Two convolutions and two linear layers for images (c, h, w)."""
    if len(input_shape) != 3:
        raise ValueError(f"cnn needs inputs of shape (channels, height, width), got {input_shape}; take mlp for tables")
    channels, height, width = input_shape
    cells = -(-height // 4) * -(-width // 4)
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * cells, 64),
        nn.ReLU(),
        nn.Linear(64, num_classes),
    )


def _mlp(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Two hidden layers of 64, for tables or anything flattened."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(torch.Size(input_shape).numel(), 64),
        nn.ReLU(),
        nn.Linear(64, 64),
        nn.ReLU(),
        nn.Linear(64, num_classes),
    )


class _Block(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters."""

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        residual: Tensor = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:  # option A: every other pixel, the new channels zero
            side = (residual.shape[1] - x.shape[1]) // 2
            x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, side, side))
        return functional.relu(residual + x)


class ResNet(nn.Module):
    """Residual network for small RGB images in [0, 1], of depth 6m + 2; it normalises its input itself.

    Parameters
    ----------
    depth : int
        20, 56, 110, ...
    num_classes : int
        Number of classes k.

    Notes
    -----
    *Source.* He et al. (2016), section 4.2, shortcuts of option A. Names of the parameters as in
    github.com/akamaster/pytorch_resnet_cifar10, whose published weights fit.
    """

    def __init__(self, depth: int, num_classes: int) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth must be 6m + 2 with m >= 1, such as 20 or 56, got {depth}")
        self.normalize = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stack(16, 16, depth // 6, 1)
        self.layer2 = self._stack(16, 32, depth // 6, 2)
        self.layer3 = self._stack(32, 64, depth // 6, 2)
        self.linear = nn.Linear(64, num_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight)

    @staticmethod
    def _stack(inputs: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
        rest = [_Block(planes, planes, 1) for _ in range(blocks - 1)]
        return nn.Sequential(_Block(inputs, planes, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (m, k) of images (m, 3, h, w)."""
        out = functional.relu(self.bn1(self.conv1(self.normalize(x))))
        out = self.layer3(self.layer2(self.layer1(out)))
        logits: Tensor = self.linear(out.mean(dim=(2, 3)))
        return logits


    def folded(self) -> ResNet:
        """Return a copy for evaluation whose batch normalisation is folded into the convolutions before it."""
        twin = copy.deepcopy(self).eval()
        for module in twin.modules():
            for number in ("1", "2"):
                conv, norm = getattr(module, f"conv{number}", None), getattr(module, f"bn{number}", None)
                if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    setattr(module, f"conv{number}", fuse_conv_bn_eval(conv, norm))
                    setattr(module, f"bn{number}", nn.Identity())
        return twin


def build(spec: str, input_shape: tuple[int, ...], num_classes: int, seed: int) -> nn.Module:
    """Build a network with fresh weights.

    Parameters
    ----------
    spec : str
        ``cnn`` (small images), ``mlp`` (tables), ``resnet20``, ``resnet56``, ``resnet110`` (RGB images in [0, 1]), or
        ``package.module:factory``. A factory is called with ``input_shape`` and ``num_classes``, as far as it takes
        them, and returns a ``torch.nn.Module``.
    input_shape : tuple of int
        Shape of one input.
    num_classes : int
        Number of classes k.
    seed : int
        Of the weights. PyTorch's global generators are left as they were.

    Returns
    -------
    Module
        From (m, ...) to logits (m, k).

    Raises
    ------
    ValueError
        For an unknown spec, an import path that leads nowhere, or a shape that the network does not take.
    TypeError
        If the factory cannot be called, or returns no module.
    """
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: that would seed the accelerators as well, which the fork does not cover.
        torch.default_generator.manual_seed(seed)
        if spec in _DEPTHS:
            if len(input_shape) != 3 or input_shape[0] != 3:
                raise ValueError(f"{spec} needs RGB images (3, height, width), got {input_shape}; take cnn or mlp")
            return ResNet(_DEPTHS[spec], num_classes)
        if spec in KNOWN:
            return {"cnn": _cnn, "mlp": _mlp}[spec](input_shape, num_classes)
        if ":" not in spec:
            raise ValueError(f"spec must be one of {', '.join(KNOWN)}, or package.module:factory, got {spec!r}")
        return _call_factory(spec, {"input_shape": input_shape, "num_classes": num_classes})


def _factory(spec: str) -> Callable[..., Any]:
    """Find the object that an import path names."""
    module_name, _, attribute = spec.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (ModuleNotFoundError, ValueError, TypeError) as error:
        # What the user's module fails to import is not a wrong spec, and shows its own traceback.
        if isinstance(error, ModuleNotFoundError) and not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ValueError(f"spec {spec!r}: no module {module_name!r}; check its name, or set PYTHONPATH") from error
    factory = getattr(module, attribute, None)
    if factory is None:
        raise ValueError(f"spec {spec!r}: module {module_name} has no attribute {attribute!r}; check its name")
    if not callable(factory):
        raise TypeError(f"spec {spec!r} must name a function or class, got {type(factory).__name__}")
    return factory  # type: ignore[no-any-return]


def _call_factory(spec: str, offered: dict[str, Any]) -> nn.Module:
    factory = _factory(spec)
    taken = inspect.signature(factory).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
        offered = {name: value for name, value in offered.items() if name in taken}
    module = factory(**offered)
    if not isinstance(module, nn.Module):
        raise TypeError(f"spec {spec!r} must return a torch.nn.Module, got {type(module).__name__}")
    return module


def _absent(path: Path) -> FileNotFoundError:
    return FileNotFoundError(f"no weights at {path}; give a .safetensors file, or a state dict saved by torch.save")


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path} cannot be read as weights ({str(error).splitlines()[0] if str(error) else type(error).__name__}); "
        "it may be truncated: fetch or save it again, as .safetensors or as a plain state dict"
    )


def _read_state(path: Path) -> Mapping[str, Tensor]:
    """State dict from a file; never unpickles anything but tensors and plain containers."""
    if not path.is_file():
        raise _absent(path)
    try:
        data = path.read_bytes()
        if data[8:9] == b"{":  # safetensors: the length of a JSON header, then the header
            return dict(load_safetensors(data))
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises whatever its bytes suggest
        raise _damaged(path, error) from error
    state = state.get("state_dict", state) if isinstance(state, Mapping) else state
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state dict of tensors; save module.state_dict(), not the module")
    return state


def load_weights(module: nn.Module, path: str | Path) -> None:
    """Load weights into a module, all of them or none.

    Parameters
    ----------
    module : Module
        Changed in place.
    path : path
        safetensors, or anything of ``torch.save`` that holds a state dict, alone or under ``state_dict``. A prefix
        ``module.`` of all names, which DataParallel leaves, is taken off.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is damaged, or its names or shapes are not those of the module; the message lists them.
    """
    source = Path(path)
    state = _read_state(source)
    if state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    expected = module.state_dict()
    # Old files lack these counters, which no prediction depends on.
    missing = [name for name in expected if name not in state and not name.endswith("num_batches_tracked")]
    problems = [f"missing {name}" for name in missing]
    problems += [f"unexpected {name}" for name in sorted(state) if name not in expected]
    problems += [
        f"{name} has shape {tuple(value.shape)}, not {tuple(expected[name].shape)}"
        for name, value in sorted(state.items())
        if name in expected and value.shape != expected[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            f"{source} does not fit this network: {', '.join(problems[:5])}{more}; build the network it was saved from"
        )
    module.load_state_dict({**expected, **state})


def save_weights(module: nn.Module, path: str | Path, metadata: Mapping[str, str]) -> None:
    """Write the weights of a module as safetensors, whole or not at all.

    Parameters
    ----------
    module : Module
        Its state dict is written.
    path : path
        The file; its folder is made if need be.
    metadata : mapping of str to str
        Kept in the file, such as sigma and the data set.

    Raises
    ------
    TypeError
        For metadata that is not text.
    OSError
        If it cannot be written.
    """
    if not all(isinstance(part, str) for pair in metadata.items() for part in pair):
        raise TypeError(f"metadata must map text to text, got {dict(metadata)}")
    # Copies, because safetensors refuses tensors that share memory.
    state = {name: value.detach().cpu().contiguous().clone() for name, value in module.state_dict().items()}
    write_atomic(path, save_safetensors(state, dict(metadata)))


def read_training(path: str | Path) -> dict[str, str] | None:
    """Metadata that `save_weights` left in a file; None for other formats, and where there is none.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no such file, or it is damaged.
    """
    source = Path(path)
    if not source.is_file():
        raise _absent(source)
    with open(source, "rb") as stream:
        if stream.read(9)[8:] != b"{":
            return None
    try:
        with safe_open(source, "pt") as file:
            found: dict[str, str] | None = file.metadata()
    except Exception as error:  # a damaged file raises whatever its bytes suggest
        raise _damaged(source, error) from error
    return found


def network_outputs(network: nn.Module, input_shape: tuple[int, ...]) -> list[float]:
    """What a network answers to eight fixed inputs, one number for each: a mix of all its outputs.

    They are the same for the same network up to rounding, whatever the machine; see `same_outputs`.
    """
    copied = BaseClassifier(copy.deepcopy(network).cpu()).eval()
    with torch.no_grad():
        outputs = copied(standard_normal((8, *input_shape), Key(0, 0, Stage.BANK, 3)))
    outputs = outputs.double().nan_to_num()
    weights = standard_normal((outputs.shape[1],), Key(0, 0, Stage.BANK, 4)).double()
    return [float(value) for value in (outputs * weights).sum(dim=1)]


def same_outputs(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether two lists of `network_outputs` agree to a thousandth of the largest; other machines round otherwise."""
    if len(first) != len(second):
        return False
    largest = max((abs(value) for value in first), default=0.0)
    return all(abs(one - other) <= 1e-3 * largest for one, other in zip(first, second, strict=True))
