"""Numbers for people: counts in powers of ten, bytes in powers of two. Knows nothing of what is counted."""


def in_parameters(value: float) -> str:
    """36625618432 -> "36.63 B", B for billions."""
    return _scaled(value, 1000.0, ("", "K", "M", "B", "T"))


def in_flops(value: float) -> str:
    """142843128832 -> "142.84 GFLOP"."""
    return _scaled(value, 1000.0, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"))


def in_bytes(value: float) -> str:
    """287834112 -> "274.50 MiB"."""
    return _scaled(value, 1024.0, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


def _scaled(value: float, step: float, units: tuple[str, ...]) -> str:
    exponent = 0
    while round(value, 2) >= step and exponent < len(units) - 1:
        value /= step
        exponent += 1
    digits = 0 if exponent == 0 else 2
    return f"{value:.{digits}f} {units[exponent]}".rstrip()
