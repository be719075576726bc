"""Reply: what an actor says when it is asked, or that it says nothing in time."""

import asyncio
from typing import Any

from ray.exceptions import RayError

from common.errors import one_line

REPLY_SECONDS = 2.0


async def reply_of(call: Any) -> Any:
    """Of a call that was made; a text where there is none. Never raises for an actor that is busy or dead."""
    try:
        return await asyncio.wait_for(asyncio.wrap_future(call.future()), REPLY_SECONDS)
    except (TimeoutError, RayError) as error:
        return f"does not answer ({one_line(error) or 'busy, or stopped'})"
