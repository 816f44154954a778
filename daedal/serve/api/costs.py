"""What an answer has cost, as the API says it: the fields `cost_details` and `cost` of a response's usage.

`cost` is dollars alone, a number, as clients read it since OpenRouter's API has it; it is there where a price is known.
Counted for every request where the server has a tariff, said where the server always says it or the request asks.
Knows nothing of HTTP.
"""

from collections.abc import Iterable
from dataclasses import asdict
from functools import reduce
from operator import add

from daedal.cost.spending import Spent
from daedal.serve.api.protocol import GenerationBody
from daedal.serve.state.errors import ApiError
from daedal.serve.state.service import Service


def check_cost(service: Service, body: GenerationBody) -> None:
    """Refuses to promise what is not counted."""
    if body.include_cost and service.tariff is None:
        sentence = "include_cost is true, and this server counts no costs: leave it out"
        raise ApiError(400, sentence, param="include_cost", code="unsupported_parameter")


def cost_json(service: Service, body: GenerationBody, spent: Iterable[Spent]) -> dict[str, object] | None:
    """Fields for a usage: what choices cost together, in the units of `Spent`, beside what joules and dollars rest on.
    None where that is not to be said, or nothing was counted.
    """
    tariff, every = service.tariff, list(spent)
    shown = service.shows_cost if body.include_cost is None else body.include_cost
    if tariff is None or not every or not shown:
        return None
    total = reduce(add, every)
    energy_source = None if tariff.energy is None else tariff.energy.source
    price = None if tariff.price is None else tariff.price.label
    told: dict[str, object] = {} if total.dollars is None else {"cost": total.dollars}
    return {**told, "cost_details": {**asdict(total), "energy_source": energy_source, "price": price}}
