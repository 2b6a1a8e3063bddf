"""The page in a real browser; skipped where there is no Chromium or playwright to drive it."""

import io
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.tools.test_serve import RUN, process
from tests.weights import LABELS

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on PATH")


@pytest.fixture(scope="module")
def url(workdir):
    with process(workdir, "--max-batch=1") as (_, address):
        yield address


@pytest.mark.parametrize("size", [(390, 844), (1280, 900)])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_picture_and_its_labels(url, size, scheme, tmp_path):
    gradient = np.linspace(0, 255, 90 * 60 * 3, dtype=np.uint8).reshape(90, 60, 3)
    file = io.BytesIO()
    Image.fromarray(gradient).save(file, "png")
    with (
        playwright.sync_playwright() as driver,
        driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]) as browser,
    ):
        page = browser.new_page(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
        wrong, asked = [], []
        page.on("pageerror", lambda error: wrong.append(error))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(url)
        page.wait_for_selector("dd:has-text('mobilevit_v2')")
        # Dropped, as a person does it.
        page.evaluate(
            """(bytes) => {
                const data = new DataTransfer();
                data.items.add(new File([new Uint8Array(bytes)], "x.png", {type: "image/png"}));
                dispatchEvent(new DragEvent("drop", {dataTransfer: data, cancelable: true}));
            }""",
            list(file.getvalue()),
        )
        page.wait_for_selector("#labels li")
        labels = page.locator("#labels .row span:first-child").all_inner_texts()
        assert sorted(labels) == sorted(LABELS)
        assert page.locator("#maps figure").count() == 3
        assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
        page.screenshot(path=tmp_path / "page.png", full_page=True)
        if "SCREENSHOTS" in os.environ:
            shutil.copy(
                tmp_path / "page.png", f"{os.environ['SCREENSHOTS']}/{size[0]}-{scheme}.png"
            )
        # What is no image is said so; then chosen with the keyboard's way in, the file input.
        page.set_input_files("#file", {"name": "x", "mimeType": "image/png", "buffer": b"no"})
        page.wait_for_selector("#error:has-text('cannot decode the image')")
        page.set_input_files(
            "#file", {"name": "x.png", "mimeType": "image/png", "buffer": file.getvalue()}
        )
        page.wait_for_selector("#labels li")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") != ""
        assert not wrong
        assert all(address.startswith((url, "data:")) for address in asked)
        assert page.locator("#model").input_value() == RUN
