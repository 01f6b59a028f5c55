"""What the library offers is listed, documented, and costs nothing to import."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Packages whose `__init__.py` is a public front; the other packages are run, not imported.
PUBLIC_PACKAGES = [
    name
    for name in ("shardscale", "comm", "kernels", "metrics", "policy", "testing")
    if (ROOT / "shardscale" / name.removeprefix("shardscale") / "__init__.py").exists()
]
# Modules besides that are public.
PUBLIC_MODULES = ["checkpoint"]
# Methods that every rank of the group calls, and that may communicate.
COLLECTIVE_METHODS = ["clip_grad_norm_", "step", "unscale_", "update"]


def load(name: str) -> types.ModuleType:
    """A front with all that it offers: `shardscale` imports some of it at its first use."""
    module = importlib.import_module(name if name == "shardscale" else f"shardscale.{name}")
    for offered in module.__all__:
        getattr(module, offered)
    return module


@pytest.mark.parametrize("package", PUBLIC_PACKAGES + PUBLIC_MODULES)
def test_all_is_sorted(package: str):
    names = load(package).__all__
    assert list(names) == sorted(names, key=str.casefold)
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("package", PUBLIC_PACKAGES)
def test_all_is_complete(package: str):
    """Whatever a front imports or defines without an underscore is offered, and nothing else."""
    module = load(package)
    visible = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and not inspect.ismodule(value)
        and type(value).__module__ != "__future__"
    }
    dunders = {name for name in module.__all__ if name.startswith("__")}
    submodules = {name for name in module.__all__ if inspect.ismodule(getattr(module, name))}
    assert visible == set(module.__all__) - dunders - submodules
    assert dunders <= {"__version__"}


@pytest.mark.parametrize("package", PUBLIC_PACKAGES + PUBLIC_MODULES)
def test_every_public_name_has_its_own_docstring(package: str):
    module = load(package)
    assert module.__doc__
    for name in module.__all__:
        value = getattr(module, name)
        if not (inspect.isclass(value) or inspect.isroutine(value)):
            continue  # a constant is explained where it is defined
        own = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
        # A NamedTuple or dataclass without a docstring is given its signature as one.
        assert own, name
        assert not own.startswith(f"{name}("), name


@pytest.mark.parametrize("package", ["shardscale", "comm"])
def test_what_is_imported_at_its_first_use_is_what_type_checkers_see(package: str):
    """Both lists of a front name the same homes, and whatever is neither does not exist."""
    front = load(package)
    tree = ast.parse(Path(front.__file__).read_text())
    typed = next(node for node in tree.body if isinstance(node, ast.If))
    assert ast.unparse(typed.test) == "typing.TYPE_CHECKING"
    imports = [node for node in typed.body if isinstance(node, ast.ImportFrom)]
    assert {
        alias.name: node.module.removeprefix(f"{front.__name__}.")
        for node in imports
        for alias in node.names
    } == front._HOMES
    assert set(front.__all__) <= set(dir(front))
    no_such_name = f"module '{front.__name__}' has no attribute 'scalar'"
    with pytest.raises(AttributeError, match=no_such_name):
        _ = front.scalar


def test_a_module_of_the_library_is_imported_at_its_first_use():
    assert load("shardscale").kernels is importlib.import_module("shardscale.kernels")


@pytest.mark.parametrize(
    "name", ["shardscale", "shardscale.comm", "shardscale.errors", "shardscale.preemption"]
)
def test_what_comes_before_torch_does_not_import_it(name: str):
    program = f"import {name}, sys; sys.exit(bool({{'torch', 'numpy'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


def public_methods() -> dict[str, object]:
    from shardscale import ShardedGradScaler

    return {
        name: value
        for name, value in inspect.getmembers(ShardedGradScaler, inspect.isroutine)
        if not name.startswith("_")
    }


def test_every_public_method_of_the_scaler_is_ours_and_documented():
    """An inherited one would act on torch's state and leave ours standing."""
    methods = public_methods()
    assert {"scale", "unscale_", "step", "update", "state_dict"} <= methods.keys()
    for name, method in methods.items():
        assert method.__module__.startswith("shardscale"), name
        assert method.__doc__, name


@pytest.mark.parametrize("name", COLLECTIVE_METHODS)
def test_a_method_says_who_must_call_it(name: str):
    assert "Collective:" in (public_methods()[name].__doc__ or "")


IMPORT_SPY = """
import collections.abc, logging, os, sys
import torch, torch.distributed

FORBIDDEN = ("typer", "rich", "triton", "mpi4py", "sklearn", "matplotlib", "prometheus_client")
before = set(sys.modules)
here = os.path.join(os.getcwd(), "shardscale") + os.sep
machinery = (os.__file__, collections.abc.__file__)
faults = []

def caller():
    frame = sys._getframe(2)
    while frame is not None and (frame.f_code.co_filename in machinery
                                 or frame.f_code.co_filename.startswith("<frozen")):
        frame = frame.f_back
    return frame

def watch(owner, name, what):
    real = getattr(owner, name)
    def spy(*args, **kwargs):
        frame = caller()
        if frame is not None and frame.f_code.co_filename.startswith(here):
            faults.append(f"{frame.f_code.co_filename}:{frame.f_lineno} {what}")
        return real(*args, **kwargs)
    setattr(owner, name, spy)

for name in ("__getitem__", "__contains__", "__iter__"):
    watch(type(os.environ), name, "reads the environment")
for name in ("is_available", "device_count", "current_device", "_lazy_init"):
    watch(torch.cuda, name, "asks for the GPU")
for name in ("is_available", "current_accelerator", "device_count"):
    watch(torch.accelerator, name, "asks for the accelerator")

def loggers():
    return {name: list(logger.handlers) for name, logger in logging.root.manager.loggerDict.items()
            if isinstance(logger, logging.Logger) and name.startswith("shardscale")}

root_handlers = list(logging.root.handlers)
import shardscale
for name in shardscale.__all__:
    getattr(shardscale, name)  # some of it is imported at its first use
import_extra
assert shardscale.__file__.startswith(here), shardscale.__file__

new = {name.split(".")[0] for name in set(sys.modules) - before}
faults += [f"imports {name}" for name in sorted(new & set(FORBIDDEN))]
faults += [f"adds a handler to {name}" for name, handlers in loggers().items() if handlers]
if logging.root.handlers != root_handlers:
    faults.append("sets up logging")
if torch.cuda.is_initialized():
    faults.append("starts CUDA")
print("\\n".join(faults))
"""


def faults_at_import(extra: str = "") -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_SPY.replace("import_extra", extra)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[:-1] if done.stdout.strip() else []


def test_importing_does_no_work():
    assert faults_at_import() == []


def test_work_at_import_would_be_seen():
    """Run lines as if they stood in the library, to see that the spy is awake."""
    source = "import os, rich, torch; os.environ.get('HOME'); torch.cuda.is_available()"
    extra = f"exec(compile({source!r}, os.path.join(here, 'fake.py'), 'exec'))"
    faults = faults_at_import(extra)
    assert [fault.split(" ", 1)[-1] for fault in faults] == [
        "reads the environment",
        "asks for the GPU",
        "rich",
    ]
