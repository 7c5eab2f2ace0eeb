"""A model in latents is served like any other: what clients give and get is data."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from serving_laws import ROWS, running
from test_codecs import SPEC, fold
from test_codecs import pipeline as latent_pipeline


def picture(text: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(text))) as image:
        return np.asarray(image)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_pictures_partial_pictures_and_edits_are_data() -> None:
    model = latent_pipeline(fold())
    with running(sources={"m": lambda: model}) as server:
        asked = {"prompt": "", "seed": 4, "num_inference_steps": 6, "stream": True, "partial_images": 2}
        status, _, body = server.ask("/v1/images/generations", asked)
        assert status == 200, body
        events = [json.loads(line[6:]) for line in body.decode().splitlines() if line.startswith("data: ")]
        seen = [picture(event["b64_json"]) for event in events]
        sampling = model.settings(steps=6)
        frames = list(model.frames(1, seed=4, sampling=sampling, rows=ROWS))
        for got, index in zip(seen[:2], (2, 4), strict=True):
            estimate = frames[index].estimate
            assert estimate is not None
            assert np.array_equal(got, SPEC.to_images(model.decode(estimate.x0))[0])
        assert np.array_equal(seen[2], SPEC.to_images(model.draw(1, seed=4, sampling=sampling, rows=ROWS))[0])
        assert seen[2].shape == (8, 8, 3)
        status, _, body = server.ask("/v1/models")
        assert status == 200
        assert b"8x8" in body
