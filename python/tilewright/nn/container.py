"""Containers: Sequential, ModuleList, ModuleDict."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tilewright.nn.module import Module


class _Numbered(Module):
    """Modules named "0", "1", ... in their order, or by given names."""

    def _fill(self, modules: Iterable[Module]) -> None:
        """Make these the only modules, numbered again."""
        for name in list(self._modules):
            delattr(self, name)
        for index, module in enumerate(modules):
            self.add_module(str(index), module)

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[Module]:
        return iter(self._modules.values())

    def _made_of(self, modules: list[Module]) -> Any:
        raise NotImplementedError

    def __getitem__(self, index: int | slice) -> Any:
        modules = list(self._modules.values())
        return self._made_of(modules[index]) if isinstance(index, slice) else modules[index]

    def __setitem__(self, index: int, module: Module) -> None:
        setattr(self, list(self._modules)[index], module)

    def __delitem__(self, index: int | slice) -> None:
        modules = list(self._modules.values())
        del modules[index]
        self._fill(modules)

    def append(self, module: Module) -> Any:
        """Add a module at the end."""
        self.add_module(str(len(self)), module)
        return self

    def extend(self, modules: Iterable[Module]) -> Any:
        """Add modules at the end."""
        for module in list(modules):
            self.append(module)
        return self

    def insert(self, index: int, module: Module) -> None:
        """Add a module before the one at index."""
        modules = list(self._modules.values())
        modules.insert(index, module)
        self._fill(modules)


class Sequential(_Numbered):
    """Modules applied one after the other, named "0", "1", ..., or by the keys of one dict."""

    def __init__(self, *modules: Module | Mapping[str, Module]) -> None:
        super().__init__()
        first = modules[0] if len(modules) == 1 else None
        named = first if isinstance(first, Mapping) else dict(enumerate(modules))
        for name, module in named.items():
            self.add_module(str(name), module)  # type: ignore[arg-type]

    def forward(self, x: Any) -> Any:
        """Feed x through every module."""
        for module in self._modules.values():
            x = module(x)
        return x

    def _made_of(self, modules: list[Module]) -> Any:
        return Sequential(*modules)


class ModuleList(_Numbered):
    """Modules in a list, named "0", "1", ...; the owner calls them."""

    def __init__(self, modules: Iterable[Module] = ()) -> None:
        super().__init__()
        self.extend(modules)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """A list computes nothing."""
        raise NotImplementedError("ModuleList has no forward; call its modules")

    def _made_of(self, modules: list[Module]) -> Any:
        return ModuleList(modules)


class ModuleDict(Module):
    """Modules by name; the owner calls them."""

    def __init__(self, modules: Mapping[str, Module] | None = None) -> None:
        super().__init__()
        self.update(modules or {})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """A dict computes nothing."""
        raise NotImplementedError("ModuleDict has no forward; call its modules")

    def update(self, modules: Mapping[str, Module] | Iterable[tuple[str, Module]]) -> None:
        """Add modules, or replace those of the same names."""
        for name, module in dict(modules).items():
            self[name] = module

    def __getitem__(self, name: str) -> Module:
        return self._modules[name]

    def __setitem__(self, name: str, module: Module) -> None:
        self.add_module(name, module)

    def __delitem__(self, name: str) -> None:
        delattr(self, name)

    def __contains__(self, name: object) -> bool:
        return name in self._modules

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def keys(self) -> Iterable[str]:
        """The names."""
        return self._modules.keys()

    def values(self) -> Iterable[Module]:
        """The modules."""
        return self._modules.values()

    def items(self) -> Iterable[tuple[str, Module]]:
        """Names and modules."""
        return self._modules.items()

    def pop(self, name: str) -> Module:
        """Remove a module and return it."""
        module = self._modules[name]
        delattr(self, name)
        return module

    def clear(self) -> None:
        """Remove all modules."""
        for name in list(self._modules):
            delattr(self, name)
