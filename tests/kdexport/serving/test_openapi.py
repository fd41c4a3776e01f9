"""The OpenAPI document of the server."""

import json
from collections.abc import Iterator
from typing import Any

from kdexport.serving.app import routes
from kdexport.serving.openapi import document
from tests.kdexport.serving.running_server import Running


def test_the_openapi_document_describes_every_route_and_its_references_resolve(server: Running) -> None:
    served = server.ask("GET", "/openapi.json").data
    assert served == json.loads(json.dumps(document([(r.path, sorted(r.methods or ())) for r in routes()])))
    assert set(served["paths"]) == {route.path for route in routes()}
    operations = [operation for path in served["paths"].values() for operation in path.values()]
    assert len({operation["operationId"] for operation in operations}) == len(operations)

    def references(node: Any) -> Iterator[str]:
        for key, item in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
            if key == "$ref":
                yield item
            yield from references(item)

    found = set(references(served))
    assert "#/components/schemas/InferRequest" in found
    for reference in found:
        assert reference.rpartition("/")[2] in served["components"]["schemas"]
