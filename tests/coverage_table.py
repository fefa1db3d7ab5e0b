"""The table op x backend x dtype x direction that the contract's tests fill and print."""

import pytest

Cell = tuple[str, str, str, str]  # op, backend, dtype, direction
_CELLS = pytest.StashKey[set[Cell]]()
_PROMISED = pytest.StashKey[set[Cell]]()


def recorded(config: pytest.Config) -> set[Cell]:
    return config.stash.setdefault(_CELLS, set())


def record(config: pytest.Config, *cell: str) -> None:
    recorded(config).add(cell)


def promised(config: pytest.Config) -> set[Cell]:
    return config.stash.setdefault(_PROMISED, set())


def empty(config: pytest.Config) -> list[Cell]:
    return sorted(promised(config) - recorded(config))


def whole_file_ran(request: pytest.FixtureRequest) -> bool:
    """No test of the file was deselected by name, node or keyword."""
    config = request.config
    narrowed = config.option.keyword or config.option.lf or any("::" in a for a in config.args)
    return not narrowed


def lines(config: pytest.Config) -> list[str]:
    """One line an op: per backend the dtypes that ran, forward/backward."""
    cells = recorded(config)
    backends = sorted({backend for _, backend, _, _ in cells})
    table = ["op".ljust(36) + "".join(backend.ljust(28) for backend in backends)]
    for op in sorted({op for op, *_ in cells}):
        row = ""
        for backend in backends:
            parts = []
            for direction in ("forward", "backward"):
                found = [d for o, b, d, way in cells if (o, b, way) == (op, backend, direction)]
                parts.append(" ".join(sorted(found)) or "-")
            row += ("all" if parts[0] == parts[1] == "bf16 fp16 fp32" else " | ".join(parts)).ljust(
                28
            )
        table.append(op.ljust(36) + row)
    return table
