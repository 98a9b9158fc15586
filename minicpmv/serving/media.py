"""Images and videos that strangers name in their messages -> bytes.

What is special:
- Only addresses of the public internet are fetched, unless their host was named when the server was started: else the
  server would read for a stranger what only its own network may see. The address that is checked is the one connected
  to, also after a redirect, so a name that changes its address in between gains nothing.
- One request has one budget of seconds, bytes and pixels for all its images and videos. Pixels are counted from the
  headers, before anything is decoded.
- A video is known by its first bytes. FFmpeg would also take lists of other files and addresses for videos, and open them.
"""

import asyncio
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from ipaddress import ip_address
from urllib.parse import quote, urljoin
from urllib.request import urlopen

import anyio
import httpcore
from PIL import Image, UnidentifiedImageError

from minicpmv.errors import MiniCPMVError
from minicpmv.serving.request import Message


MAX_REDIRECTS = 3
HEADERS: dict[bytes | str, bytes | str] = {"User-Agent": "minicpmv", "Accept": "image/*, video/*"}
VIDEOS = re.compile(
    rb"....(?:ftyp|moov|mdat|free|skip|wide)|\x1aE\xdf\xa3|RIFF....(?:AVI |WEBP)|GIF8|\x89PNG|FLV|OggS|0&\xb2u"
    rb"|\x00\x00\x01[\xba\xb3]|G(?=.{187}G)",
    re.DOTALL,
)


class MediaError(MiniCPMVError):
    """An image or video that is not taken: the message names it, the limit and what to do."""


_FETCH_ERRORS = (
    httpcore.NetworkError,
    httpcore.ProtocolError,
    httpcore.TimeoutException,
    httpcore.UnsupportedProtocol,
)


@dataclass(frozen=True)
class MediaLimits:
    """What all images and videos of one request may take together."""

    seconds: float = 20  # to fetch them
    megabytes: float = 64  # of those that are fetched; a data URL is part of the request
    megapixels: float = 128  # of images
    hosts: frozenset[str] = frozenset()  # fetched from wherever they are


async def read_messages(messages: Sequence[Message], limits: MediaLimits) -> list[dict]:
    """Messages (`request.Message`) as the processor takes them, with the bytes of images and videos in them.

    Raises:
        MediaError: an image or video cannot be fetched, is not one, or is beyond the limits.
    """
    result, bytes_left, pixels_left = [], int(limits.megabytes * 1e6), int(limits.megapixels * 1e6)
    try:
        with anyio.fail_after(limits.seconds):
            for message in messages:
                turn = message.model_dump(exclude_none=True, exclude={"content"})
                if message.content is not None:
                    turn["content"] = []
                    for part in message.content:
                        if part.type == "text":
                            turn["content"].append(part.model_dump(exclude_none=True))
                            continue
                        kind = part.type.removesuffix("_url")
                        url = getattr(part, part.type).url
                        if url[:5].lower() == "data:":
                            data = await asyncio.to_thread(_decode, url)
                        else:
                            data = await fetch(url, limits, bytes_left)
                            bytes_left -= len(data)
                        if kind == "image":
                            pixels_left -= _pixels(data, url)
                            if pixels_left < 0:
                                raise MediaError(
                                    f"{url[:80]}: the images of this request have more than {limits.megapixels:g} "
                                    "megapixels; scale them down"
                                )
                        elif not VIDEOS.match(data):
                            raise MediaError(
                                f"{url[:80]}: not a video; give MP4, MOV, Matroska, WebM, AVI, MPEG, WMV, FLV, Ogg, GIF, "
                                "WebP or PNG"
                            )
                        turn["content"].append({"type": kind, kind: data})
                result.append(turn)
    except TimeoutError as error:
        raise MediaError(
            f"the images and videos of this request did not come within {limits.seconds:g} seconds; send data URLs"
        ) from error
    return result


async def fetch(url: str, limits: MediaLimits, max_bytes: int) -> bytes:
    """The bytes at an http or https address.

    Raises:
        MediaError: it is not public, cannot be reached, answers with an error, or is larger than `max_bytes`.
    """
    name, target = url[:200], url
    try:
        async with httpcore.AsyncConnectionPool(network_backend=_CheckedNetwork(limits.hosts)) as pool:
            for _ in range(MAX_REDIRECTS + 1):
                address = quote(target, safe="%/:?#[]@!$&'()*+,;=~")
                async with pool.stream("GET", address, headers=HEADERS) as response:
                    headers = {key.lower(): value.decode("latin-1") for key, value in response.headers}
                    if response.status in (301, 302, 303, 307, 308) and b"location" in headers:
                        target = urljoin(target, headers[b"location"])
                        continue
                    if response.status != 200:
                        raise MediaError(f"{name}: its server answers with status {response.status}")
                    data = bytearray()
                    async for chunk in response.aiter_stream():
                        data += chunk
                        if len(data) > max_bytes:
                            raise MediaError(
                                f"{name}: the images and videos of this request are larger than "
                                f"{limits.megabytes:g} MB; scale them down"
                            )
                    return bytes(data)
    except MediaError:
        raise
    except (*_FETCH_ERRORS, OSError, ValueError) as error:
        raise MediaError(f"{name}: cannot be fetched ({error or type(error).__name__}); send a data URL") from error
    raise MediaError(f"{name}: more than {MAX_REDIRECTS} redirects; give the address that it ends at")


class _CheckedNetwork(httpcore.AsyncNetworkBackend):
    """Connects to public addresses, and to the named hosts."""

    def __init__(self, hosts):
        self._hosts, self._network = hosts, httpcore.AnyIOBackend()

    async def connect_tcp(self, host, port, timeout=None, local_address=None, socket_options=None):
        addresses = [host]
        if host.lower() not in self._hosts:
            found = await anyio.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            addresses = list(dict.fromkeys(address[0] for *_, address in found))
            for address in map(ip_address, addresses):
                if not (getattr(address, "ipv4_mapped", None) or address).is_global:
                    raise MediaError(
                        f"{host} is {address}, which is not on the public internet: send a data URL, or let the server be "
                        f"started with --media-host {host}"
                    )
        for address in addresses:
            try:
                return await self._network.connect_tcp(address, port, timeout, local_address, socket_options)
            except httpcore.NetworkError as error:
                reason = error
        raise reason

    async def sleep(self, seconds):
        await self._network.sleep(seconds)


def _decode(url: str) -> bytes:
    try:
        with urlopen(url) as answer:
            return answer.read()
    except ValueError as error:
        raise MediaError(f"data URL {url[:40]!r}... cannot be read ({error}); expected data:...;base64,...") from error


def _formats() -> list[str]:
    """What Pillow may read: all but EPS, a program whose header alone may take it half a minute."""
    Image.init()
    return [name for name in Image.OPEN if name != "EPS"]


def _pixels(data: bytes, url: str) -> int:
    """Pixels of an image by its header."""
    try:
        with Image.open(BytesIO(data), formats=_formats()) as image:
            return image.width * image.height
    except Image.DecompressionBombError as error:
        raise MediaError(f"{url[:80]}: {error}; scale it down") from error
    except UnidentifiedImageError as error:
        raise MediaError(f"{url[:80]}: not an image in a format that Pillow reads") from error
    except (OSError, ValueError) as error:
        raise MediaError(f"{url[:80]}: cannot be read as an image ({error})") from error
