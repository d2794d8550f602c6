"""Measures the cost of admission, for a request that does not have to wait and for each of many that do.

    python -m benchmarks.admission

It prints the microseconds of the admission alone, as the best of five measurements. There is no socket or server.
"""

from __future__ import annotations

import asyncio
import time
import timeit

from lmbridge.config import Limits
from lmbridge.transport.admission import Admission

BAR = 5.0
"""The most microseconds that admission may cost a request that does not have to wait."""


async def uncontended(limits: Limits) -> float:
    admission = Admission(limits)
    first = await admission.acquire("m")
    admission.mark_loaded(first)
    admission.release(first)

    def once() -> None:
        permit = admission.acquire_now("m")
        assert permit is not None
        admission.release(permit)

    return min(timeit.repeat(once, number=20_000, repeat=5)) / 20_000 * 1e6


async def waiting(count: int, models: int) -> float:
    admission = Admission(Limits(max_concurrency=10, max_loaded_models=1, max_wait=3600))

    async def one(number: int) -> None:
        permit = await admission.acquire(str(number % models))
        admission.mark_loaded(permit)
        await asyncio.sleep(0)
        admission.release(permit)

    began = time.process_time()
    await asyncio.gather(*[one(number) for number in range(count)])
    return (time.process_time() - began) / count * 1e6


async def main() -> None:
    for title, limits in (("no limit on models", Limits()), ("one model at a time", Limits(max_loaded_models=1))):
        cost = await uncontended(limits)
        print(
            f"a request that need not wait, {title:20} {cost:6.2f} µs  bar {BAR} µs  {'ok' if cost <= BAR else 'over'}"
        )
    for models in (1, 10_000):
        few, many = [min([await waiting(count, models) for _ in range(5)]) for count in (1_000, 10_000)]
        title = "one model" if models == 1 else "each its own model"
        growth = f"{few:6.1f} and {many:.1f} µs: {many / few:.2f} times"
        print(f"a request of 1,000 and of 10,000 that wait, {title:18} {growth}")


if __name__ == "__main__":
    asyncio.run(main())
