"""Count the kernels that a GPU would launch: every operator of torch that computes, and every launch of Triton."""

from collections import Counter

import pytest
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes


class KernelCount(TorchDispatchMode):
    """One kernel for each operator that makes or changes a tensor, and for each launch from `modules`.

    Views and allocations launch none.

    Args:
        modules: of Triton kernels; those whose names end in _kernel are counted.

    `names` counts by name, `total` is their sum.
    """

    def __init__(self, *modules):
        super().__init__()
        self.names: Counter[str] = Counter()
        self._modules, self._patch = modules, pytest.MonkeyPatch()

    @property
    def total(self) -> int:
        return self.names.total()

    def __enter__(self):
        for module in self._modules:
            for name in [name for name in dir(module) if name.endswith("_kernel")]:
                self._patch.setattr(module, name, _Counted(getattr(module, name), name, self.names))
        return super().__enter__()

    def __exit__(self, *error):
        self._patch.undo()
        return super().__exit__(*error)

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        schema = operator._schema
        name = schema.name.split("::")[1]
        views = any(result.alias_info and not result.alias_info.is_write for result in schema.returns)
        result = operator(*arguments, **(keywords or {}))
        on_host = schema.returns and str(schema.returns[0].type) not in ("Tensor", "List[Tensor]")
        if not (views or on_host or name.startswith(("empty", "new_empty", "_unsafe_view"))):
            self.names[name] += 1
        return result


class _Counted:
    def __init__(self, kernel, name, names):
        self.kernel, self.name, self.names = kernel, name, names

    def __getitem__(self, grid):
        def launch(*arguments, **keywords):
            self.names[self.name] += 1
            with _disable_current_modes():
                self.kernel[grid](*arguments, **keywords)

        return launch
