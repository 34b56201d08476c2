"""What the services of the store promise."""
# mypy: disable-error-code="empty-body"
# pyright: reportReturnType=false

from decimal import Decimal

from msgspec import Struct

from quintet import Contract, notification, request


class Product(Struct, frozen=True):
    id: str
    name: str
    price: Decimal


class Rating(Struct, frozen=True):
    stars: float
    count: int


class Delivery(Struct, frozen=True):
    days: int
    fee: Decimal


class Catalogue(Contract, name="catalogue", version="1.0"):
    """What is for sale."""

    @request(http="GET /products/{product_id}")
    async def get(self, product_id: str) -> Product: ...


class Reviews(Contract, name="reviews", version="1.0"):
    """What others think of it."""

    @request(http="GET /products/{product_id}/rating")
    async def rating(self, product_id: str) -> Rating: ...


class Recommendation(Contract, name="recommendation", version="1.0"):
    """What others bought with it. A page without that is still a page."""

    @request(http="GET /products/{product_id}/recommendations")
    async def bought_with(self, product_id: str) -> list[str]: ...


class Shipping(Contract, name="shipping", version="1.0"):
    """When it would arrive."""

    @request(http="GET /products/{product_id}/delivery")
    async def estimate(self, product_id: str) -> Delivery: ...


class Order(Struct, frozen=True):
    id: str
    product_id: str
    quantity: int


class Warehouse(Struct, frozen=True):
    """What stands in the warehouse: the orders of its parcels, one for each parcel, and what is left of a product."""

    parcels: list[str]
    left: int


class Shop(Contract, name="shop", version="1.0"):
    """Where customers order."""

    @request(http="PUT /orders/{order_id}")
    async def order(self, order_id: str, product_id: str, quantity: int) -> Order:
        """The order as it was accepted: it is on disk, and will be fulfilled."""


class Fulfilment(Contract, name="fulfilment", version="1.0"):
    """Who takes from the shelf, packs and sends."""

    @notification
    async def fulfil(self, order: Order) -> None: ...

    @request(http="GET /products/{product_id}/warehouse")
    async def warehouse(self, product_id: str) -> Warehouse: ...
