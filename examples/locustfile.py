"""Load of `based serve` by locust: clients that hold conversations by states, and clients that stream.

    locust -f examples/locustfile.py --headless --host http://127.0.0.1:8000 -u 20 -r 20 -t 60s --only-summary

An answer that is no 200, or a stream that is cut off, counts as a failure; locust's exit status is then 1.
"""

import random

from locust import FastHttpUser, task

TURNS = 4
WORDS = ["def", "class", "return", "import", "the", "a", "of", "state", "token"]


def text() -> str:
    """A few words."""
    return "".join(f"{random.choice(WORDS)} " for _ in range(random.randint(1, 60)))


class Client(FastHttpUser):
    """One of them."""

    @task(3)
    def stream(self) -> None:
        """An answer by server-sent events."""
        body = {"prompt": text(), "max_tokens": 16, "stream": True}
        with self.client.post("/v1/completions", json=body, name="stream", catch_response=True) as response:
            if response.status_code == 200 and not response.text.endswith("data: [DONE]\n\n"):
                response.failure("the stream is cut off")

    @task
    def conversation(self) -> None:
        """Turns that each go on from the state of the one before; then the states are deleted."""
        names = []
        for turn in range(TURNS):
            body = {"prompt": text(), "max_tokens": 16, "save_state": True}
            body |= {"state_id": names[-1]} if names else {}
            response = self.client.post("/v1/completions", json=body, name=f"turn {turn + 1}")
            if response.status_code != 200:
                break
            names.append(response.json()["state_id"])
        for name in names:
            self.client.delete(f"/v1/states/{name}", name="delete")
