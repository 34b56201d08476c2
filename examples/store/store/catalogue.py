"""Catalogue: what is for sale."""

from decimal import Decimal

from quintet import Service
from store.contracts import Catalogue, Product

service = Service(Catalogue)


@service.handles(Catalogue.get)
async def get(product_id: str) -> Product:
    return Product(product_id, f"Bicycle {product_id}", Decimal("499.00"))
