"""A classifier served over HTTP, marked for every customer; one of them leaks it, and is named.

Acme trains a network on scikit-learn's digits and serves its probabilities to twenty customers, to
each with signs of their own. customer-2 asks about images, distils a network of their own from the
answers, and serves that one. Acme asks it about 1,500 images, over HTTP too, and sees whose answers
it has learnt from.

    python examples/serve_with_recipients.py
"""

from __future__ import annotations

import io
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import numpy as np
import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from PIL import Image
from sklearn.datasets import load_digits
from transformers import ResNetConfig, ResNetForImageClassification

from hf_watermark import OwnerKey
from hf_watermark.softlabels import SoftLabelWatermark
from hf_watermark.softlabels.endpoint import Endpoint
from hf_watermark.softlabels.probe_images import ProbeImages
from hf_watermark.verify import verify_outputs

CUSTOMERS = [f"customer-{i}" for i in range(20)]
API_KEYS = {f"key-of-{name}": name for name in CUSTOMERS}
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
QUERIES, PROBES = 6000, 1500

Answer = Callable[[torch.Tensor, str], torch.Tensor]  # pixel values, the API key: logits


# The network ------------------------------------------------------------------------------------


def network(names: list[str]) -> ResNetForImageClassification:
    return ResNetForImageClassification(
        ResNetConfig(
            embedding_size=24,
            hidden_sizes=[32, 64],
            depths=[1, 1],
            layer_type="basic",
            id2label=dict(enumerate(names)),
        )
    )


def trained(model, x: torch.Tensor, targets: torch.Tensor, epochs: int):
    """On labels, or on probabilities of all classes."""
    optimizer = torch.optim.AdamW(model.train().parameters(), weight_decay=1e-3)
    steps = epochs * (len(x) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(x))[: len(x) // 64 * 64].split(64):
            logits = model(pixel_values=x[batch]).logits
            loss = torch.nn.functional.cross_entropy(logits, targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


# Images -----------------------------------------------------------------------------------------


def pixels(image: Image.Image) -> torch.Tensor:
    """An image as the network takes it, (3, 16, 16)."""
    gray = torch.from_numpy(np.array(image.convert("L").resize((16, 16)))).float()
    return (gray / 127.5 - 1).expand(3, -1, -1)


def blends(digits: np.ndarray, n: int, seed: int) -> list[Image.Image]:
    """Unlabelled images: two digits laid over each other, one of them faint."""
    rng = np.random.default_rng(seed)
    share = 0.45 * rng.random((n, 1, 1))
    mixed = (1 - share) * digits[rng.integers(len(digits), size=n)]
    mixed += share * digits[rng.integers(len(digits), size=n)]
    return [Image.fromarray((one * 15.9).astype(np.uint8)).resize((16, 16)) for one in mixed]


def batch(images: list[Image.Image]) -> torch.Tensor:
    return torch.stack([pixels(image) for image in images])


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


# Over HTTP --------------------------------------------------------------------------------------


@contextmanager
def serving(answer: Answer, names: list[str], keys: dict[str, str]) -> Iterator[str]:
    """An API in the shape of HF inference: POST an image, get labels and scores. Yields its URL."""
    app = FastAPI()

    @app.post("/classify")
    async def classify(request: Request) -> list[dict[str, str | float]]:
        api_key = request.headers.get("authorization", "").removeprefix("Bearer ")
        if keys and api_key not in keys:
            raise HTTPException(401, "unknown API key")
        with Image.open(io.BytesIO(await request.body())) as image, torch.inference_mode():
            p = answer(pixels(image)[None], keys.get(api_key, "")).softmax(-1)[0]
        order = p.argsort(descending=True).tolist()
        return [{"label": names[i], "score": round(float(p[i]), 4)} for i in order]

    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", ws="none"))
    # Named TCP, or asyncio leaves Nagle's algorithm on: 40 ms for every answer.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/classify"
    finally:
        server.should_exit = True
        thread.join()


def stolen(url: str, images: list[Image.Image]):
    """What customer-2 does: ask, and train on the answers. Their classes are in another order."""
    names = sorted(NAMES)
    targets = torch.zeros(len(images), len(names))
    with httpx2.Client(headers={"Authorization": "Bearer key-of-customer-2"}) as client:
        for row, image in zip(targets, images, strict=True):
            response = client.post(url, content=png(image))
            response.raise_for_status()
            for item in response.json():
                row[names.index(item["label"])] = item["score"]
    return trained(network(names), batch(images), targets, 8), names


def main() -> None:
    started = time.perf_counter()
    torch.manual_seed(0)
    data = load_digits()
    digits, labels = data.images, torch.from_numpy(data.target)
    x = batch([Image.fromarray((one * 15.9).astype(np.uint8)) for one in digits])

    # Acme: a network of its own, a key, and what it will ask suspects, fixed beforehand.
    teacher = trained(network(NAMES), x[:900], labels[:900], 12)
    served = SoftLabelWatermark(teacher, OwnerKey.generate(owner="acme"), count=32)
    served.calibrate(batch(blends(digits[:900], 1200, seed=1)))
    pictures = blends(digits[:900], PROBES, seed=2)
    probes = served.probes(batch(pictures))
    told = served.for_recipient("customer-2").distortion(x[900:], labels[900:])
    print(f"What customers get, {told}")
    assert told.flips == 0
    assert told.accuracy[0] == told.accuracy[1] > 0.85

    def answer(pixel_values: torch.Tensor, customer: str) -> torch.Tensor:
        return served(pixel_values=pixel_values, recipients=[customer]).logits

    with serving(answer, NAMES, API_KEYS) as url:
        refused = httpx2.post(url, content=png(pictures[0]))
        assert refused.status_code == 401
        student, names = stolen(url, blends(digits[900:], QUERIES, seed=3))
    with torch.inference_mode():
        right = student(pixel_values=x[900:]).logits.argmax(-1)
    truth = torch.tensor([names.index(NAMES[label]) for label in labels[900:]])
    accuracy = float((right == truth).float().mean())
    print(f"The thief's network, distilled from {QUERIES} answers, is right on {accuracy:.1%}")
    assert accuracy > 0.8

    # The thief serves it; Acme asks, like anyone could. Its file of answers survives failures.
    with tempfile.TemporaryDirectory() as folder:
        for i, picture in enumerate(pictures):
            picture.save(Path(folder) / f"{i:04d}.png")
        images = ProbeImages(folder)

        def suspect(pixel_values: torch.Tensor, customer: str) -> torch.Tensor:
            return student(pixel_values=pixel_values).logits

        with serving(suspect, names, {}) as url:
            answers = Endpoint(url, log=Path(folder) / "answers.jsonl")(images)
    evidence = verify_outputs(answers, None, probes, (), CUSTOMERS)
    print(
        f"Asked about {evidence.probes} images: {evidence.verdict}, the answers of "
        f"{evidence.recipient}; t {evidence.t:.1f}, log10 p {evidence.log10_p:.1f} "
        f"({evidence.tries} customers counted)"
    )
    assert evidence.found
    assert evidence.recipient == "customer-2"
    assert evidence.log10_p < -9

    # Somebody who trained on labels of their own is not accused.
    innocent = trained(network(NAMES), x[900:], labels[900:], 12)
    with torch.inference_mode():
        theirs = innocent(pixel_values=batch(pictures)).logits.softmax(-1).numpy()
    other = verify_outputs(theirs, None, probes, (), CUSTOMERS)
    print(f"Somebody else's network: {other.verdict} (log10 p {other.log10_p:.1f})")
    assert not other.found
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
