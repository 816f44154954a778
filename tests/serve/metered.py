"""A service of a small real model that counts what answers cost."""

from pathlib import Path

from daedal.checkpoint.load import load
from daedal.cost.energy import Steady
from daedal.cost.spending import Price, Tariff
from daedal.infer.engine import Engine
from daedal.serve.state.service import Service
from daedal.serve.workers.thread_worker import ThreadWorker
from daedal.text.chat import load_format
from daedal.text.tokenizer import Tokenizer
from tests.serve.live import MODEL

TARIFF = Tariff(
    energy=Steady(60.0, "this"), price=Price(label="rented", dollars_per_second=0.001, dollars_per_joule=0.0)
)


def metered_service(directory: Path, *, shows_cost: bool = False, **engine: int) -> Service:
    tokenizer = Tokenizer.load(directory)
    return Service(
        worker=ThreadWorker(Engine(load(directory), tokenizer=tokenizer, max_batch=4, tariff=TARIFF, **engine)),
        tokenizer=tokenizer,
        chat_format=load_format(directory),
        model_name=MODEL,
        tariff=TARIFF,
        shows_cost=shows_cost,
    )
