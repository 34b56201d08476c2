"""Recommendation: what others bought with a product. This is the one that hangs."""

from quintet import Service
from store.contracts import Recommendation

service = Service(Recommendation)


@service.handles(Recommendation.bought_with)
async def bought_with(product_id: str) -> list[str]:
    return [f"a lock for {product_id}", "a helmet"]
