"""Where the agent's process begins: `python -m tokenfactory.agent <options as JSON>`.

Importing `kubernetes.aio` runs the package's own `__init__` first, which loads the synchronous client with requests
and OAuth: a tenth of this process's memory, on every node, for code that never runs. The package is therefore entered
without its `__init__`; should a later version need it, it is loaded as usual.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types


def enter_without_init(package: str, wanted: str) -> bool:
    """Import `wanted`, which lies in `package`, without running the package's `__init__`, if that works."""
    if package in sys.modules:
        return False
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        return False
    bare = types.ModuleType(package)
    bare.__path__ = list(spec.submodule_search_locations)
    bare.__spec__ = spec
    sys.modules[package] = bare
    try:
        importlib.import_module(wanted)
    except (ImportError, AttributeError):
        for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
            del sys.modules[name]
        return False
    return True


if __name__ == "__main__":
    enter_without_init("kubernetes", "kubernetes.aio.config")
    from tokenfactory.agent.main import main

    main(sys.argv[1])
