"""A hub on this machine, with tiny models under their published names and revisions, that can fail in several ways.

As a program it loads models as a user would, the hub failing or not, and prints what came of it as JSON. It has a
process of its own because huggingface_hub reads HF_ENDPOINT and its cache's place when it is imported.
"""

import dataclasses
import hashlib
import json
import os
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FAULTS = ("refuses", "stalls", "fails")


class Hub(ThreadingHTTPServer):
    """Serves {repository: folder}, each at one revision.

    Attributes:
        asked: the paths that were asked for.
        fault: "stalls" to accept connections and never answer, "fails" to answer 503, None to work.
    """

    daemon_threads = True

    def __init__(self, published: dict[str, tuple[Path, str]]):
        super().__init__(("127.0.0.1", 0), _Answer)
        self.published, self.asked, self.fault = published, [], None
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Answer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        if self.server.fault == "stalls":
            time.sleep(120)
        if self.server.fault:
            return self._send(503, b"")
        path = self.path.partition("?")[0].strip("/")
        for name, (folder, revision) in self.server.published.items():
            files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
            if path in (f"api/models/{name}", f"api/models/{name}/revision/{revision}"):
                siblings = [{"rfilename": file} for file in files]
                return self._send(200, json.dumps({"id": name, "sha": revision, "siblings": siblings}).encode())
            if path == f"api/models/{name}/tree/{revision}":
                entries = [_entry(path, file) for path, file in files.items()]
                return self._send(200, json.dumps(entries).encode())
            if path.startswith(f"{name}/resolve/{revision}/"):
                file = files.get(path.removeprefix(f"{name}/resolve/{revision}/"))
                if file:
                    tag = {"ETag": f'"{_digest(file)}"', "X-Repo-Commit": revision}
                    return self._send(200, file.read_bytes(), tag)
        self._send(404 if path else 200, b"", {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def _digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


def _entry(path: str, file: Path) -> dict[str, object]:
    return {"type": "file", "path": path, "size": file.stat().st_size, "oid": _digest(file)}


@contextmanager
def faulty(hub: Hub, fault: str | None):
    """The hub with a fault, known to the package at once; a server that refuses is one whose port is closed."""
    from huggingface_hub import constants

    from dalleflamingo import registry

    registry._heard.clear()
    endpoint, hub.fault = constants.ENDPOINT, fault
    if fault == "refuses":
        constants.ENDPOINT = "http://127.0.0.1:9"
    try:
        yield
    finally:
        constants.ENDPOINT, hub.fault = endpoint, None
        registry._heard.clear()


def main(folder: Path) -> dict[str, object]:
    """Load models from the hub, then with every fault from the cache, and models that are not there."""
    import tiny
    import torch
    from diffusers import StableDiffusionPipeline

    from dalleflamingo import profiles, registry
    from dalleflamingo.evaluation.vocabulary_report import wordpiece_tokenizer
    from dalleflamingo.sources import models

    torch.set_num_threads(1)
    made = {"blip-large": tiny.blip, "sd-v1-4": tiny.stable_diffusion, "dino-vitb8": tiny.dino}
    for name, make in made.items():
        entry = registry.ENTRIES[name]
        (target := folder / name).mkdir()
        hub.published[entry.source] = make(target), entry.revision
    pipeline = StableDiffusionPipeline.from_pretrained(folder / "sd-v1-4").to(torch.float16)
    pipeline.save_pretrained(folder / "sd-v1-4", variant="fp16")
    index = folder / "sd-v1-4/model_index.json"
    components = json.loads(index.read_text()) | {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]
    }
    index.write_text(json.dumps(components))
    (folder / "sd-v1-4/safety_checker").mkdir()
    for name in ("model.safetensors", "model.fp16.safetensors"):
        (folder / "sd-v1-4/safety_checker" / name).write_bytes(b"not to be fetched")

    profile = profiles.PROFILES["colab"]
    profiles.Profile.torch_dtype = torch.float16  # as with a GPU

    def load() -> list[str]:
        loaded = [models.load_captioner(profile).model]
        loaded.append(models.load_generator(profile).pipeline.unet)
        loaded.append(models.Dino.from_pretrained(**registry.source_of("dino-vitb8"), image_size=32).model)
        sums = (sum(float(weight.detach().double().abs().sum()) for weight in model.parameters()) for model in loaded)
        return [f"{model.dtype} {total}" for model, total in zip(loaded, sums, strict=True)]

    result = {"downloaded": load(), "asked": list(hub.asked), "cached": {}, "absent": {}}
    for fault in FAULTS:
        hub.asked.clear()
        with faulty(hub, fault):
            began = time.monotonic()
            result["cached"][fault] = [load(), time.monotonic() - began, list(hub.asked)]
    registry.SBERT_PACKAGE = "a_package_that_is_not_installed"
    absent = {
        "blip2-opt-2.7b-coco": lambda: models.load_captioner(profile, "blip2-opt-2.7b-coco"),
        "sd-v1-4": lambda: models.load_generator(dataclasses.replace(profile, dtype="float32")),  # only fp16 is there
        "clip-vit-l-14": lambda: models.ClipImage.from_pretrained(**registry.source_of("clip-vit-l-14")),
        "sbert": wordpiece_tokenizer,
    }
    profiles.Profile.torch_dtype = torch.float32
    for fault in FAULTS:
        for name, load_one in absent.items():
            with faulty(hub, fault):
                began = time.monotonic()
                try:
                    load_one()
                except registry.RegistryError as error:
                    result["absent"][f"{name}, the hub {fault}"] = [str(error), time.monotonic() - began]
    return result


if __name__ == "__main__":
    hub = Hub({})
    home = Path(sys.argv[1])
    os.environ |= {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home / "home"),
        "HF_HUB_OFFLINE": "",
        "HF_HUB_DISABLE_XET": "1",
    }
    print(json.dumps(main(home)))
