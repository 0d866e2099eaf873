"""A model of effzoo in sentence-transformers, and on a hub that answers here."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub import constants
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from test_ecosystem_trainers import WORDS, tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import effzoo
import effzoo.transformers
from effzoo.errors import ConversionError
from effzoo.transformers import wrap

SMALL = {"layers": 2, "dim": 32, "heads": 4, "mlp": 48, "vocab": 60, "max_length": 256, "pad_token": 0}


def built(task="features", **more):
    torch.manual_seed(0)
    return effzoo.build("bert", task=task, **(SMALL | more)).eval()


TEXTS = [" ".join(WORDS * 4), "w1 w2 w3"]  # 200 tokens and 3


@torch.no_grad()
def by_hand(model):
    """The mean over the tokens of each text."""
    return torch.stack([
        model(tokenizer()(text, return_tensors="pt")["input_ids"]).last_hidden_state[0].mean(0) for text in TEXTS
    ])  # fmt: skip


@pytest.mark.parametrize("peft", [None, "lora[rank=2]"])
def test_a_folder_is_a_sentence_transformer(peft, tmp_path):
    model = built(attention="longformer[window=16]", peft=peft) if peft else built(attention="longformer[window=16]")
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    cut = tokenizer()
    effzoo.save(model, tmp_path / "model", tokenizer=cut)
    assert cut.model_max_length == 64, "what was given stays"
    sentences = SentenceTransformer(str(tmp_path / "model"))
    assert sentences.max_seq_length == 256, "long texts are not cut"
    found = sentences.encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(found, by_hand(model), rtol=0, atol=1e-5)
    sentences.save(str(tmp_path / "sentences"))
    again = SentenceTransformer(str(tmp_path / "sentences"))
    assert torch.equal(again.encode(TEXTS, convert_to_tensor=True), found)
    inner = effzoo.load(tmp_path / "sentences")
    assert bool(peft) == bool(effzoo.attached(inner))
    torch.testing.assert_close(by_hand(inner), by_hand(model))
    first = SentenceTransformer(modules=[Transformer(str(tmp_path / "model")), Pooling(32, pooling_mode="cls")])
    ids = tokenizer()(TEXTS[0], return_tensors="pt")["input_ids"]
    expected = model(ids).last_hidden_state[0, 0].detach()
    torch.testing.assert_close(first.encode(TEXTS[0], convert_to_tensor=True), expected, rtol=0, atol=1e-5)


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as one push and one download ask for."""

    files: dict[str, dict[str, bytes]] = {}
    COMMIT = "a" * 40

    def log_message(self, *given):
        pass

    def answer(self, content, status=200, **headers):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.split("?")[0].strip("/").split("/")
        if path[:3] == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = f"me/{asked['name'].split('/')[-1]}"
            self.files.setdefault(name, {})
            return self.answer({"url": f"{constants.ENDPOINT}/{name}", "name": name})
        name = "/".join(path[2:4])
        if "preupload" in path:
            asked = json.loads(body)["files"]
            return self.answer({"files": [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in asked
            ]})  # fmt: skip
        if "commit" in path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[name][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            return self.answer({
                "commitUrl": f"{constants.ENDPOINT}/{name}/commit/{self.COMMIT}", "commitOid": self.COMMIT,
                "success": True, "hookOutput": "",
            })  # fmt: skip
        return self.answer({}, 200)

    def do_GET(self):
        path = self.path.split("?")[0].strip("/").split("/")
        if path[0] == "api" and path[1] == "models":
            name = "/".join(path[2:4])
            if name not in self.files:
                return self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            siblings = [{"rfilename": file} for file in self.files[name]]
            if "tree" in path:
                entries = [{"type": "file", "path": file, "size": len(data), "oid": "0" * 40}
                           for file, data in self.files[name].items()]  # fmt: skip
                return self.answer(entries)
            return self.answer({"id": name, "sha": self.COMMIT, "siblings": siblings, "private": False, "tags": []})
        if "resolve" in path:
            name, file = "/".join(path[:2]), "/".join(path[4:])
            data = self.files.get(name, {}).get(file)
            if data is None:
                return self.answer(b"", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=self.COMMIT)
            return self.answer(data, ETag=f'"{hash(data)}"', X_Repo_Commit=self.COMMIT)
        return self.answer({"name": "me", "type": "user", "auth": {}})

    do_HEAD = do_GET


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    monkeypatch.setattr(Hub, "files", {})
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    for name, value in {"ENDPOINT": address, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True,
                        "HF_HUB_CACHE": str(tmp_path / "cache")}.items():  # fmt: skip
        monkeypatch.setattr(constants, name, value)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    for place in (huggingface_hub.hf_api, huggingface_hub.file_download):
        for name in ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE"):
            if hasattr(place, name):
                monkeypatch.setattr(place, name, getattr(constants, name))
    for api in (huggingface_hub.hf_api.api, transformers.utils.hub.hf_api()):  # made before, by other tests
        monkeypatch.setattr(api, "endpoint", address)
    yield Hub
    server.shutdown()
    server.server_close()


def test_a_model_is_pushed_and_loaded_by_its_id(hub):
    model = effzoo.attach(built("classification", attention="longformer[window=16]"), "lora[rank=2]").eval()
    model.push_to_hub("me/long", token="hf_stand_in")
    tokenizer().push_to_hub("me/long", token="hf_stand_in")
    held = hub.files["me/long"]
    assert {"config.json", "model.safetensors", "fingerprint.json", "modeling_effzoo.py", "tokenizer.json"} <= {*held}
    assert "adapters/default/adapter.json" in held
    ids = tokenizer()(TEXTS[0], return_tensors="pt")["input_ids"]
    again = effzoo.load("me/long")
    assert torch.equal(again(ids).logits, model(ids).logits) and list(effzoo.attached(again)) == ["default"]
    other = effzoo.build(pretrained="me/long").eval()
    assert torch.equal(other(ids).logits, model(ids).logits)
    theirs = AutoModelForSequenceClassification.from_pretrained("me/long")
    assert torch.equal(theirs(ids).logits, model(ids).logits)
    assert AutoTokenizer.from_pretrained("me/long")(TEXTS[1])["input_ids"]
    with pytest.raises(ConversionError, match="me/other"):
        effzoo.load("me/other")


def test_a_model_that_was_downloaded_opens_without_a_network(hub, monkeypatch):
    model = built("classification")
    wrap(model).push_to_hub("me/kept", token="hf_stand_in")
    effzoo.load("me/kept")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.files.clear()
    ids = tokenizer()(TEXTS[1], return_tensors="pt")["input_ids"]
    assert torch.equal(effzoo.load("me/kept")(ids).logits, model(ids).logits)
