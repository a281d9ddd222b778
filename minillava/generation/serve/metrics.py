"""What the server has done and is doing, in Prometheus' text format."""

from __future__ import annotations

from minillava.generation.serve.running import Running


def exposition(running: Running) -> str:
    """Counters and gauges, with their help lines."""
    scheduler, memory, totals = running.scheduler, running.scheduler.memory, running.totals
    assert memory is not None
    counters = {
        "requests": (totals["requests"], "Prompts taken"),
        "requests_failed": (totals["failed"], "Prompts that the model failed on"),
        "requests_cancelled": (totals["cancelled"], "Prompts whose clients left"),
        "prompt_tokens": (totals["prompt_tokens"], "Tokens of answered prompts, visual ones included"),
        "prompt_tokens_reused": (totals["reused"], "Of them, taken over from earlier requests"),
        "prefilled_tokens": (scheduler.prefilled_tokens, "Prompt tokens computed"),
        "generated_tokens": (totals["new_tokens"], "Tokens of answers"),
        "pictures_encoded": (running.engine.pictures_seen, "Pictures through the vision tower"),
        "pictures_reused": (memory.pictures.hits, "Pictures taken from the cache"),
    }
    gauges = {
        "requests_open": (running.open, "Requests from their first byte to their last"),
        "requests_running": (len(scheduler.live) + (scheduler.entering is not None), "Requests in slots"),
        "requests_waiting": (len(scheduler.waiting), "Requests that wait for a slot"),
        "slots": (scheduler.slots.rows, "Requests that can run at once"),
        "prefix_blocks": (len(memory.prefixes), "Blocks of keys and values kept"),
        "picture_bytes": (memory.pictures.held_bytes, "Visual tokens kept"),
    }
    lines = []
    for kind, values, end in (("counter", counters, "_total"), ("gauge", gauges, "")):
        for name, (value, help) in values.items():
            metric = f"minillava_{name}{end}"
            lines += [f"# HELP {metric} {help}.", f"# TYPE {metric} {kind}", f"{metric} {value}"]
    return "\n".join(lines) + "\n"
