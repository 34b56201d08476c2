"""A page of product details, composed in three ways: by naive threads, by guarded asyncio, by guarded threads.

Each is given where the services are, by name, and gives a function from a product's id to its page. The guarded ones
tell a listener what happens to their calls of Recommendation.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping
from contextlib import asynccontextmanager, contextmanager
from http.client import HTTPConnection
from typing import Literal, TypeAlias, TypeVar
from urllib.parse import urlsplit

from msgspec import Struct, json

from quintet import Breaker, Bulkhead, Policy, blocking, connect, deadline, on, stale
from quintet.policy import Policies
from quintet.watch import Listener
from store.contracts import Catalogue, Delivery, Product, Rating, Recommendation, Reviews, Shipping

T = TypeVar("T")
Freshness: TypeAlias = Literal["fresh", "stale", "none"]
Addresses: TypeAlias = Mapping[str, str]

PATIENCE = 2.0  # seconds that a visitor waits for a page; who has waited longer is gone


class Page(Struct, frozen=True):
    product: Product
    rating: Rating
    recommended: list[str]
    delivery: Delivery
    freshness: Freshness
    """Of what is recommended."""


Compose: TypeAlias = Callable[[str], Page]
ComposeAsync: TypeAlias = Callable[[str], Awaitable[Page]]

# --- naive: a blocking HTTP client of the standard library, which waits for ever unless it is told not to


@contextmanager
def naive(at: Addresses) -> Generator[Compose]:
    def ask(service: str, path: str, kind: type[T]) -> T:
        where = urlsplit(at[service])
        connection = HTTPConnection(where.hostname or "", where.port)
        try:
            connection.request("GET", path)
            return json.decode(connection.getresponse().read(), type=kind)
        finally:
            connection.close()

    def page(product_id: str) -> Page:
        path = f"/v1/products/{product_id}"
        return Page(
            product=ask("catalogue", path, Product),
            rating=ask("reviews", f"{path}/rating", Rating),
            recommended=ask("recommendation", f"{path}/recommendations", list[str]),
            delivery=ask("shipping", f"{path}/delivery", Delivery),
            freshness="fresh",
        )

    yield page


# --- guarded: the same policy for both

NEEDED = Policy(timeout=PATIENCE)  # without these there is no page
WELCOME: Policies = [
    Policy(
        timeout=0.3,
        bulkhead=Bulkhead(4),  # it may hold four of our threads, never all of them
        breaker=Breaker(error_rate=0.5, min_calls=10, window=2.0, open_for=1.0, longest=1.0),
    ),
    on(Recommendation.bought_with, fallback=[stale(max_age=60), []]),
]


@asynccontextmanager
async def guarded(at: Addresses, listener: Listener) -> AsyncGenerator[ComposeAsync]:
    async with (
        connect(Catalogue, at["catalogue"], policy=NEEDED) as catalogue,
        connect(Reviews, at["reviews"], policy=NEEDED) as reviews,
        connect(Recommendation, at["recommendation"], policy=WELCOME, listener=listener) as recommendation,
        connect(Shipping, at["shipping"], policy=NEEDED) as shipping,
    ):

        async def page(product_id: str) -> Page:
            with deadline(PATIENCE):
                product, rating, recommended, delivery = await asyncio.gather(
                    catalogue.get(product_id),
                    reviews.rating(product_id),
                    recommendation.bought_with.reply(product_id),
                    shipping.estimate(product_id),
                )
            return Page(product, rating, recommended.value, delivery, freshness(recommended.value, recommended.stale))

        yield page


@contextmanager
def guarded_threads(at: Addresses, listener: Listener) -> Generator[Compose]:
    with (
        blocking.connect(Catalogue, at["catalogue"], policy=NEEDED) as catalogue,
        blocking.connect(Reviews, at["reviews"], policy=NEEDED) as reviews,
        blocking.connect(Recommendation, at["recommendation"], policy=WELCOME, listener=listener) as recommendation,
        blocking.connect(Shipping, at["shipping"], policy=NEEDED) as shipping,
    ):

        def page(product_id: str) -> Page:
            with deadline(PATIENCE):
                recommended = recommendation.bought_with.reply(product_id)
                return Page(
                    product=catalogue.get(product_id),
                    rating=reviews.rating(product_id),
                    recommended=recommended.value,
                    delivery=shipping.estimate(product_id),
                    freshness=freshness(recommended.value, recommended.stale),
                )

        yield page


def freshness(recommended: list[str], is_stale: bool) -> Freshness:
    if not recommended:
        return "none"
    return "stale" if is_stale else "fresh"
