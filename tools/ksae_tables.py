"""The k-SAE step's benchmark on CPUs as tables, with the goals that it reaches and misses."""

from math import inf
from typing import Any

from revelio.wording import plural

# Goals on every kind of machine: at least so many times as fast as each. The last one is that the whole step
# takes at most 0.75 of PyTorch's plain float32 product.
KSAE_GOALS = {"dense": 10.0, "sparsify": 4.0, "float32 product alone": 1 / 0.75}


def ksae_summary(result: dict[str, Any]) -> str:
    """The range of the k-SAE step's ratios over batch sizes, by machine."""
    said = []
    for name, machine in result["machines"].items():
        ratio = _ratio_of(machine)
        dense, peer = (
            [one[other][ratio] for one in machine["batches"] if other in one]
            for other in ("dense", "sparsify")
        )
        line = f"{name}{_how(machine)} {min(dense):.0f} to {max(dense):.0f} times"
        said.append(line + (f" ({min(peer):.1f} to {max(peer):.1f})" if peer else ""))
    return (
        f"A training step of a k-SAE (d = {result['d']}, n = {result['n']:,}, k = {result['k']}) on two CPU "
        "cores, as fast as the dense released step (in brackets as sparsify), from the worst to the best "
        f"batch size: {'; '.join(said)}.\n"
    )


def ksae_lines(result: dict[str, Any]) -> str:
    """The k-SAE step's benchmark, a line a kind of machine and batch size."""
    machines = result["machines"]
    threads = next(iter(machines.values()))["batches"][0]["threads"]
    lines = [
        f"`benchmarks/ksae_step.py` (d = {result['d']}, n = {result['n']:,}, k = {result['k']}, {threads} "
        "threads), samples a second of the native kernel over the others', steps taken in turn, by what the "
        "processor multiplies with (the goal on each is in the head; what is below it is **missed**):",
        "",
        "| instructions | batch | over the dense step (goal 10x) | every row moving (processor time) | "
        "over sparsify (goal 4x) | over PyTorch's float32 product alone (goal 1.33x) | peak GiB, ours and "
        "dense | without the native kernel, over "
        "the dense step (processor time) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        _ksae_line(f"{name}{_how(machine)}", one, _ratio_of(machine))
        for name, machine in machines.items()
        for one in machine["batches"]
    ]
    lines += [f"\n{text}" for name, one in machines.items() if (text := _held(name, one))]
    lines += [f"\n{text}" for name, one in machines.items() if (text := _phases(name, one))]
    lines += [f"\n{text}" for name, one in machines.items() if (text := _floors(name, one, result))]
    return "\n".join(lines) + "\n"


# A kernel's parts, for people.
PARTS = {
    "encode": "encoding",
    "update": "the update",
    "decode": "decoding",
    "code_gradients": "the codes' gradients",
    "unit_norm": "unit lengths",
}


def _phases(name: str, machine: dict[str, Any]) -> str:
    """What the native step's processor time goes into, where that was measured."""
    said = []
    for one in machine["batches"]:
        parts = one["native"].get("processor_parts", {})
        total = sum(parts.values())
        shares = [
            f"{words} {100 * parts[part] / total:.0f} %"
            for part, words in PARTS.items()
            if part in parts
        ]
        if shares:
            said.append(f"batch {one['batch']}: {', '.join(shares)}")
    if not said:
        return ""
    share = machine.get("product_share_of_encoding")
    product = (
        f" Of encoding, the nomination's product is {100 * share:.0f} % (perf)." if share else ""
    )
    return f"The kernel's processor time on {name}: {'; '.join(said)}.{product}"


def _held(name: str, machine: dict[str, Any]) -> str:
    """What a newer processor that stands in for an older kind was held by."""
    if "held_to" not in machine:
        return ""
    by = ", ".join(f"`{variable}={value}`" for variable, value in machine["held_by"].items())
    return (
        f"{name}: the native kernel, PyTorch and sparsify are all held to what a processor of kind "
        f"{machine['held_to']} has ({by}); clock, caches and memory are the machine's own."
    )


def _floors(name: str, machine: dict[str, Any], result: dict[str, Any]) -> str:
    """How fast a thread could be at best, where its peaks were measured, beside what it reaches."""
    peaks = machine.get("peaks_of_a_thread")
    if not peaks:
        return ""
    read, of = peaks["gigabytes_read"], peaks["billion_products"]
    numbers = result["n"] * result["d"] / 1e9

    def floor(batch: int, kind: str) -> float:
        """Seconds: a pass over the weights, or the products, whatever takes longer."""
        size = {"float32": 4, "int16": 2, "int8": 1}[kind]
        return max(numbers * size / read, numbers * batch / of[kind])

    said = []
    for one in machine["batches"]:
        best = floor(one["batch"], "float32")
        step, product = (
            one[part]["processor_seconds"] for part in ("native", "float32 product alone")
        )
        said.append(
            f"batch {one['batch']}: float32's product {best:.3f} s (PyTorch's takes {product:.3f} s), int8's "
            f"{floor(one['batch'], 'int8'):.3f} s; the whole step takes {step:.3f} s, {step / best:.2f} of a "
            "float32 product at its floor"
        )
    turns = {
        one["batch"]: one["native in int16"]["by_processor_time"]
        for one in machine["batches"]
        if "native in int16" in one
    }
    paired = ", ".join(f"{times:.2f} times at batch {batch}" for batch, times in turns.items())
    faster = (
        f"In turn with these, steps that nominate in int8 are {paired} as fast (processor time)."
    )
    rates = ", ".join(f"{rate} billion {kind}" for kind, rate in of.items())
    return (
        f"A thread on {name} multiplies and adds at most {rates} numbers a second and reads {read} GB. At "
        f"least: {'; '.join(said)}." + (f" {faster}" if turns else "")
    )


def _ratio_of(machine: dict[str, Any]) -> str:
    """Which ratio counts: of wall time, or, on a machine that others shared, of processor time."""
    return machine.get("ratio", "native_is_times_faster")


def _how(machine: dict[str, Any]) -> str:
    """What is special about a machine's measurement."""
    if _ratio_of(machine) == "native_is_times_faster":
        return ""
    batches = machine["batches"]
    threads = plural(batches[0]["threads"], "thread")
    # Its own threads are a load of as many.
    alone = all(one.get("load", inf) < one["threads"] + 0.5 for one in batches)
    return f" (by processor time, {threads}{'' if alone else ', beside other work'})"


def _judged(value: float, other: str) -> str:
    """A ratio, and whether it misses its goal."""
    return f"{value:.1f}x" + (" **missed**" if value < KSAE_GOALS[other] else "")


def ksae_trained_line(result: dict[str, Any]) -> str:
    """The same after some training, when scores lie closer together."""
    said = [
        f"{name} (it multiplies with {one['native']['multiplied_with']} by then), batch {one['batch']}: "
        f"{one['dense']['by_processor_time']:.1f} times"
        for name, machine in result["machines"].items()
        for one in machine["batches"]
    ]
    return (
        f"After {result['trained_steps']:,} steps of training (`--trained`), when the k-th score of a row is "
        f"small beside the norms and more latents have to be scored, by processor time over the dense "
        f"step: {'; '.join(said)}.\n"
    )


def _ksae_line(instructions: str, one: dict[str, Any], ratio: str) -> str:
    dense, native = one["dense"], one["native"]
    # These steps are not taken in turn: their wall time depends on what else the machine did.
    moving = dense["processor_seconds"] / one["native, all rows moving"]["processor_seconds"]
    portable = dense["processor_seconds"] / one["torch"]["processor_seconds"]
    peer = _judged(one["sparsify"][ratio], "sparsify") if "sparsify" in one else ""
    floor = one["float32 product alone"]
    product = floor.get(ratio, floor["seconds"] / native["seconds"])
    peaks = [one[name].get("peak_gib") for name in ("native", "dense")]
    peak = " and ".join(f"{peak:.2f}" for peak in peaks if peak is not None)
    return (
        f"| {instructions} | {one['batch']} | {_judged(dense[ratio], 'dense')} | {moving:.1f}x | "
        f"{peer} | {_judged(product, 'float32 product alone')} | {peak} | {portable:.1f}x |"
    )
