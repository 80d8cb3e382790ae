"""Module: a tree of layers, with names for every array in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np

import tilewright
from tilewright.autograd import Tensor, unwrap
from tilewright.device import as_array, device_of, is_device_name, moved, named
from tilewright.errors import DtypeError, FormatError, ShapeError
from tilewright.recording import current
from tilewright.tensor import is_float, tensor

# The ops by name; Any, because a decorator makes them that mypy can't see through.
tw: Any = tilewright

M = TypeVar("M", bound="Module")


def Parameter(data: Any) -> Tensor:
    """A Tensor that is trained: set as an attribute of a Module, it is one of its parameters."""
    return tensor(data, requires_grad=True)


class Module:
    """Base class of layers and models.

    A subclass sets parameters, buffers and sub-modules as attributes in ``__init__``, and defines
    ``forward``; calling the module calls it. A Tensor that requires a gradient becomes a parameter;
    ``register_buffer`` adds an array that is saved but not trained.

    Attributes:
        training: whether dropout is on; set by ``train()`` and ``eval()``.
    """

    training: bool
    _float32: frozenset[str] = frozenset()  # buffers that stay float32 whatever ``to`` says

    def __init__(self) -> None:
        self.training = True
        self._parameters: dict[str, Tensor] = {}
        self._buffers: dict[str, Any] = {}
        self._modules: dict[str, Module] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module computes; a subclass defines it."""
        raise NotImplementedError(f"{type(self).__name__} defines no forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if (noted := current()) is not None:
            noted.enters(self)
        return self.forward(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if type(value) is Tensor and value.requires_grad and value._node is None:
            self._parameters[name] = value
        elif isinstance(value, Module):
            self._modules[name] = value
        elif "_modules" in self.__dict__:
            self._parameters.pop(name, None)
            self._modules.pop(name, None)
            if name in self._buffers:
                self._buffers[name] = value
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        for members in (self._parameters, self._buffers, self._modules):
            members.pop(name, None)
        super().__delattr__(name)

    def register_buffer(self, name: str, array: Any) -> None:
        """Add an array that belongs to the state but is not trained."""
        self._buffers[name] = array
        super().__setattr__(name, array)

    def register_parameter(self, name: str, parameter: Tensor | None) -> None:
        """Add a parameter under a name that needs not be one of Python's."""
        setattr(self, name, parameter)

    def add_module(self, name: str, module: Module) -> None:
        """Add a module under a name that needs not be one of Python's."""
        if not isinstance(module, Module):
            raise TypeError(
                f"{type(self).__name__}: {name} must be a Module, got {type(module).__name__}"
            )
        if "." in name or not name or (name not in self._modules and hasattr(self, name)):
            raise KeyError(f"{type(self).__name__}: {name!r} is no name for a module here")
        setattr(self, name, module)

    # The tree ---------------------------------------------------------------------------------

    def children(self) -> Iterator[Module]:
        """The modules directly below."""
        yield from self._modules.values()

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """The modules directly below, with their names."""
        yield from self._modules.items()

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """This module and all below, with dotted names."""
        yield prefix, self
        for name, child in self._modules.items():
            yield from child.named_modules(f"{prefix}.{name}" if prefix else name)

    def modules(self) -> Iterator[Module]:
        """This module and all below."""
        for _, module in self.named_modules():
            yield module

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter once, with its dotted name."""
        seen = set()
        for prefix, module in self.named_modules():
            for name, parameter in module._parameters.items():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield f"{prefix}.{name}" if prefix else name, parameter

    def parameters(self) -> Iterator[Tensor]:
        """Every parameter once."""
        for _, parameter in self.named_parameters():
            yield parameter

    def named_buffers(self) -> Iterator[tuple[str, Any]]:
        """Every buffer with its dotted name."""
        for prefix, module in self.named_modules():
            for name, array in module._buffers.items():
                yield f"{prefix}.{name}" if prefix else name, array

    def buffers(self) -> Iterator[Any]:
        """Every buffer."""
        for _, array in self.named_buffers():
            yield array

    def get_submodule(self, target: str) -> Module:
        """The module of a dotted name; "" is this one."""
        module = self
        for name in target.split(".") if target else ():
            if name not in module._modules:
                raise AttributeError(f"{type(module).__name__} has no module {name!r} ({target})")
            module = module._modules[name]
        return module

    def apply(self: M, function: Callable[[Module], Any]) -> M:
        """Call a function on every module, those below first: for initial weights."""
        for child in self.children():
            child.apply(function)
        function(self)
        return self

    def requires_grad_(self: M, requires_grad: bool = True) -> M:
        """Set whether the parameters get gradients; they stay parameters."""
        for parameter in self.parameters():
            parameter.requires_grad = requires_grad
        return self

    def to(self: M, target: Any) -> M:
        """Convert the floating parameters and buffers, or move all of them to a device, in place.

        Gradients are forgotten. The scales and offsets of quantized weights stay float32.

        Args:
            target: a dtype or its name; "cpu" or the name of another device.

        Raises:
            DeviceError: there is no such device.
        """
        if is_device_name(target):
            device = named("to", target)
            self._convert(lambda x: moved(x, device), every=True)
        else:
            self._convert(lambda x: x.astype(target, copy=False), every=False)
        return self

    def _convert(self, convert: Callable[[Any], Any], every: bool) -> None:
        for parameter in self.parameters():
            converted = convert(parameter.data)
            if converted is not parameter.data:
                parameter.data = converted
                parameter.grad = None
                parameter.mark_written()
        for module in self.modules():
            for name, array in module._buffers.items():
                if every or (is_float(array.dtype) and name not in module._float32):
                    setattr(module, name, convert(array))
            module._mode_changed()

    def train(self: M, mode: bool = True) -> M:
        """Switch to training: dropout on."""
        for module in self.modules():
            module.training = mode
            module._mode_changed()
        return self

    def eval(self: M) -> M:
        """Switch to inference: dropout off, constant weights packed."""
        return self.train(False)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, or fill them with zeros."""
        for parameter in self.parameters():
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad[...] = 0

    def _mode_changed(self) -> None:
        """Called after ``training`` was set; a layer drops what it prepared."""

    # State ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Every parameter and buffer by its dotted name: the arrays themselves, not copies."""
        state = {name: parameter.data for name, parameter in self.named_parameters()}
        state.update(self.named_buffers())
        return state

    def load_state_dict(self, state: dict[str, Any], strict: bool = True) -> None:
        """Copy arrays into the parameters and buffers, converted to their dtypes.

        Args:
            state: arrays or Tensors by dotted name, on any device.
            strict: every name must be there, and no other; else only common names are copied.

        Raises:
            FormatError: names are missing or left over; nothing was copied.
            ShapeError, DtypeError: naming the first tensor that does not fit; nothing was copied.
        """
        own = self.state_dict()
        if not strict:
            own = {name: mine for name, mine in own.items() if name in state}
            state = {name: state[name] for name in own}
        missing = [name for name in own if name not in state]
        unexpected = [name for name in state if name not in own]
        if missing or unexpected:
            raise FormatError(
                f"{type(self).__name__}: the state must have the names of this model; "
                f"missing: {_listed(missing)}; unexpected: {_listed(unexpected)}"
            )
        arrays = {name: as_array(unwrap(state[name])) for name in own}
        for name, mine in own.items():
            _check_fits(name, mine, arrays[name])
        for name, mine in own.items():
            mine[...] = moved(arrays[name], device_of(mine)).astype(mine.dtype, copy=False)
        for parameter in self.parameters():
            parameter.mark_written()
        for module in self.modules():
            module._mode_changed()

    def __repr__(self) -> str:
        lines = [
            f"  ({name}): " + repr(child).replace("\n", "\n  ")
            for name, child in self._modules.items()
        ]
        head = f"{type(self).__name__}({self.extra_repr()}"
        return head + (("\n" + "\n".join(lines) + "\n)") if lines else ")")

    def extra_repr(self) -> str:
        """The settings that ``repr`` shows."""
        return ""


def _check_fits(name: str, mine: Any, given: Any) -> None:
    if given.shape != mine.shape:
        raise ShapeError(
            f"load_state_dict: {name} must have shape {mine.shape} to fit this model, "
            f"got {given.shape}"
        )
    kinds = is_float(mine.dtype), is_float(given.dtype)
    if kinds != (True, True) and mine.dtype != given.dtype:
        raise DtypeError(f"load_state_dict: {name} must be {mine.dtype}, got {given.dtype}")
    if given.dtype == np.float64:
        raise DtypeError(f"load_state_dict: {name} must not be float64; use x.astype(np.float32)")


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:8])
    return (shown + (f" and {len(names) - 8} more" if len(names) > 8 else "")) or "none"
