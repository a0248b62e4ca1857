"""A stand-in for `vllm serve` in this process: it answers with a real model, and can be told to misbehave."""

import json
import queue
import tempfile
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from onpath.engines.head import unwrapped
from onpath.engines.hf import HFEngine
from onpath.records import Prompt, Sampling

Answer = dict[str, Any]
_LOADING = threading.Lock()  # transformers patches torch while it loads, and there may be several servers


class FakeVLLM:
    """Serves one model at `url` until `stop()`; `start()` again takes the same port.

    `spoil` changes an answer before it is sent, or returns a status to send instead; `slow` seconds pass
    before each answer; `requests` are those to /v1/completions so far.
    """

    def __init__(self, engine: HFEngine, name: str) -> None:
        self.engine, self.name = engine, name
        self.spoil: Callable[[Answer], Answer | int] = lambda answer: answer
        self.slow = 0.0
        self.longest = 512
        self.requests: list[Answer] = []
        self.headers: list[str | None] = []
        self.resets = 0
        self.takes_weights = True
        self.waits_for_push: Callable[[Answer], bool] = lambda body: False
        """Which requests wait until new weights arrive after them, or 0.3 s."""
        self._pushes = 0
        self._pushed = threading.Condition()
        self._original = {k: v.clone() for k, v in unwrapped(engine.model).state_dict().items()}
        self.adapters: dict[str, tuple[str, Answer]] = {}
        """Name → path and, with the adapter merged, the model's weights."""
        self.transfers = True
        """Whether it was started for vLLM's weight transfer."""
        self.version, self.met, self.meetings = "default", False, 0
        """What its weights are called, whether it has been met, and how often."""
        self.inbox: queue.Queue[tuple[str, torch.Tensor]] = queue.Queue()
        """Tensors on the wires."""
        self._lock = threading.Lock()
        self._queue: dict[int, Answer] = {}
        """Requests that are on their way to the lock: who has it generates for all of them."""
        self._ready: dict[int, Answer] = {}
        self._port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self, *, fresh: bool = False) -> None:
        """`fresh`: as after a restart, with the weights that it was started with."""
        if fresh:
            unwrapped(self.engine.model).load_state_dict(self._original)
            self.adapters.clear()
            self.version, self.met, self.inbox = "default", False, queue.Queue()
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), self._handler())
        self._server.daemon_threads = True
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                told = {
                    "/weight_info": {"weight_version": fake.version},
                    "/get_world_size": {"world_size": 1},
                    "/server_info?config_format=json": {
                        "vllm_config": {
                            "weight_transfer_config": {"backend": "nccl"} if fake.transfers else None
                        }
                    },
                }
                if self.path in told:
                    return self._send(told[self.path])
                more = [{"id": n, "root": p, "parent": fake.name} for n, (p, _) in fake.adapters.items()]
                self._send(
                    {"data": [{"id": fake.name, "root": fake.name, "max_model_len": fake.longest}, *more]}
                )

            def do_POST(self) -> None:
                size = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(size) or b"{}")
                fake.headers.append(self.headers.get("Authorization"))
                time.sleep(fake.slow)
                if fake.waits_for_push(body):
                    fake.wait_for_push()
                if "seed" in body and self.path == "/v1/completions":
                    fake._queue[id(body)] = body
                with fake._lock:
                    answer = fake.answer(self.path, body)
                self._send(answer)

            def _send(self, answer: Answer | int | str) -> None:
                status = answer if isinstance(answer, int) else 200
                data = json.dumps({"error": {"message": "told to"}} if isinstance(answer, int) else answer)
                data = answer if isinstance(answer, str) else data
                self.send_response(status)
                self.end_headers()
                self.wfile.write(data.encode())

        return Handler

    def wait_for_push(self) -> None:
        with self._pushed:
            seen = self._pushes
            self._pushed.wait_for(lambda: self._pushes > seen, timeout=0.3)

    def answer(self, path: str, body: Answer) -> Answer | int | str:
        if path == "/reset_prefix_cache":
            self.resets += 1
            return {}
        if path == "/collective_rpc":
            assert body["method"] == "reload_weights"
            if self.takes_weights:
                take(self.engine.model, Path(body["kwargs"]["weights_path"]), Path(self.name))
            with self._pushed:
                self._pushes += 1
                self._pushed.notify_all()
            return {"results": [None]}
        if path == "/init_weight_transfer_engine":
            self.met, self.meetings = True, self.meetings + 1
            return {}
        if path == "/start_weight_update":
            return {}
        if path == "/update_weights":
            return self._receive(body["update_info"]["names"])
        if path == "/finish_weight_update":
            self.version = body["weight_version"]
            return {}
        if path == "/v1/load_lora_adapter":
            if not self.takes_weights or body["lora_name"] in self.adapters:
                return 400
            self.adapters[body["lora_name"]] = body["lora_path"], self._adapted(body["lora_path"])
            return f"Success: LoRA adapter '{body['lora_name']}' added successfully."
        if path == "/v1/unload_lora_adapter":
            return "Success" if self.adapters.pop(body["lora_name"], None) else 404
        if path == "/tokenize":
            asked = self.engine.renderer.tokenizer(body["prompt"], add_special_tokens=False)
            return self.spoil({"tokens": asked["input_ids"]})
        if path == "/v1/chat/completions":
            self.requests.append(body)
            return self.spoil({"model": f"{self.name}-of-today", "choices": [self._message(body)]})
        assert path == "/v1/completions"
        if body["model"] != self.name and body["model"] not in self.adapters:
            return 404
        if self.adapters:
            weights = self.adapters.get(body["model"], (None, self._original))[1]
            unwrapped(self.engine.model).load_state_dict(weights)
        self.requests.append(body)
        scoring = "prompt_logprobs" in body
        choice = self._scores(body) if scoring else self._completion(body)
        return self.spoil({"model": body["model"], "choices": [{"index": 0, **choice}]})

    def _receive(self, names: list[str]) -> Answer | int:
        if not self.met:
            return 500
        received = dict(self.inbox.get(timeout=5) for _ in names)
        assert [*received] == names
        if self.takes_weights:
            with tempfile.TemporaryDirectory() as directory:
                save_file({n: t.clone() for n, t in received.items()}, Path(directory) / "model.safetensors")
                unwrapped(self.engine.model).config.save_pretrained(directory)
                take(self.engine.model, Path(directory), Path(self.name))
        return {}

    def _adapted(self, path: str) -> Answer:
        """The base's weights with a directory's adapter added."""
        described = json.loads((Path(path) / "adapter_config.json").read_text())
        found, merged = load_file(Path(path) / "adapter_model.safetensors"), dict(self._original)
        for name, down in found.items():
            if name.endswith("lora_A.weight"):
                target = name.removeprefix("base_model.model.").replace("lora_A.", "")
                delta = found[name.replace("lora_A", "lora_B")] @ down
                merged[target] = merged[target] + described["lora_alpha"] / described["r"] * delta
        return merged

    def _completion(self, body: Answer) -> Answer:
        if id(body) not in self._ready:
            self._complete([other for other in [*self._queue.values()] if _alike(other, body)])
        del self._queue[id(body)]
        return self._ready.pop(id(body))

    def _complete(self, bodies: list[Answer]) -> None:
        one = bodies[0]
        sampling = Sampling(
            temperature=one["temperature"], top_p=one["top_p"], top_k=one["top_k"],
            max_new_tokens=one["max_tokens"],
        )  # fmt: skip
        self.engine.stop_strings = tuple(one.get("stop", ()))
        prompts, seeds = [body["prompt"] for body in bodies], [str(body["seed"]) for body in bodies]
        for body, c in zip(bodies, self.engine.continue_from(prompts, sampling, keys=seeds), strict=True):
            found = {"token_ids": list(c.ids), "logprobs": {"token_logprobs": list(c.logprobs)}}
            self._ready[id(body)] = found

    def _message(self, body: Answer) -> Answer:
        renderer = self.engine.renderer
        sampling = Sampling(
            temperature=body["temperature"], top_p=body["top_p"], max_new_tokens=body["max_tokens"]
        )
        prompt = Prompt(id="", text=body["messages"][-1]["content"])
        (c,) = self.engine.continue_from([renderer.ids(prompt)], sampling, keys=[str(body.get("seed"))])
        content = "".join(renderer.tokens([i for i in c.ids if i not in self.engine.stop_ids]))
        message = {"role": "assistant", "content": content}
        return {"index": 0, "message": message, "finish_reason": c.finish_reason}

    @torch.no_grad()
    def _scores(self, body: Answer) -> Answer:
        ids, k = body["prompt"], body["prompt_logprobs"]
        logp_TV = unwrapped(self.engine.model)(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        entries: list[Answer | None] = [None]
        for row_V, token in zip(logp_TV[:-1], ids[1:], strict=True):
            best = [int(i) for i in row_V.topk(k).indices]
            entries.append({str(i): {"logprob": float(row_V[i])} for i in dict.fromkeys([token, *best])})
        return {"prompt_logprobs": entries, "token_ids": [0]}


def _alike(one: Answer, other: Answer) -> bool:
    """Whether two requests differ in prompt and seed only."""
    return {**one, "prompt": 0, "seed": 0} == {**other, "prompt": 0, "seed": 0}


def take(model: nn.Module, directory: Path, started_from: Path) -> None:
    """Loads a weights directory as a server would: a checkpoint, whole, or not at all. The file of a server's
    start says what its names are; of a tied output layer it may hold one."""
    own = unwrapped(model)
    given, known = ({*load_file(d / "model.safetensors")} for d in (directory, started_from))
    tied = own.get_output_embeddings().weight is own.get_input_embeddings().weight
    more = {*own.all_tied_weights_keys} if tied else set()
    assert known <= given <= known | more, f"not this checkpoint's: {sorted(given ^ known)[:4]}"
    with _LOADING:
        again, found = type(own).from_pretrained(
            directory, config=own.config, dtype=own.dtype, output_loading_info=True
        )
    assert not any(found.values()), found
    own.load_state_dict(again.state_dict(), strict=True)
