"""Settings and facts that have a few legal values. On the wire and on the command line they are their strings."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum


class Exactness(StrEnum):
    """Whether a row's arithmetic may depend on the rows beside it."""

    INVARIANT = "invariant"  # never: a request's tokens are the same in any batch
    STOCK = "stock"  # it may: the library's fastest kernels


class Homes(StrEnum):
    """Which ranks of a host run its requests, where one rank alone can use all of the host's cores."""

    APART = "apart"  # all of them: a death concerns as few requests as can be
    TOGETHER = "together"  # one: experts are read once for all of them, which is faster


class Dtype(StrEnum):
    """Type of weights and activations."""

    AUTO = "auto"  # the checkpoint's
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Device(StrEnum):
    """Where ranks compute."""

    AUTO = "auto"  # a GPU if there is one
    CPU = "cpu"
    CUDA = "cuda"


class GenerationConfig(StrEnum):
    """Where the sampling settings come from that a request does not name."""

    MODEL = "model"  # the checkpoint's generation_config.json
    NONE = "none"  # OpenAI's: temperature 1, nothing cut off


class ToolCallParser(StrEnum):
    """How a model writes tool calls. The names are vLLM's."""

    AUTO = "auto"  # as its chat template has it
    NONE = "none"  # tool calls are left in the text
    HERMES = "hermes"  # Qwen too
    MISTRAL = "mistral"
    LLAMA3_JSON = "llama3_json"
    LLAMA4_JSON = "llama4_json"
    DEEPSEEK_V3 = "deepseek_v3"
    DEEPSEEK_V31 = "deepseek_v31"


class ReasoningParser(StrEnum):
    """How a model marks its reasoning. The names are vLLM's."""

    NONE = "none"  # it is left in the text
    DEEPSEEK_R1 = "deepseek_r1"  # it comes first and ends with </think>
    QWEN3 = "qwen3"  # it is between <think> and </think>, if there is any


class OperationKind(StrEnum):
    """What an operation changes."""

    SCALE = "scale"
    DRAIN = "drain"
    UNDRAIN = "undrain"


class DetectedBy(StrEnum):
    """How a rank's end was noticed: by its agent (`rank_died`) or by the engine (`rank_masked`, `rank_left`)."""

    ROBUST_FUTEX = "robust futex"  # its main thread ended
    PIDFD = "pidfd"  # its process ended
    QUEUE = "queue"  # its queue of answers ended
    SILENCE = "silence"  # nothing comes from its host any more
    STOPPED = "stopped"  # the kernel holds it stopped
    HUNG = "hung"  # it owes an answer and does nothing
    DEADLINE = "deadline"  # it did not answer in time
    START = "start"  # it never came up
    HEARTBEAT = "heartbeat"  # it was alive, and silent for too long
    STALL = "stall"  # its load made no progress for too long
    AGENT = "agent"  # its agent, on another host, reported its exit


class Trigger(StrEnum):
    """What a change of membership was for."""

    START = "start"
    LOSS = "loss"
    JOIN = "join"
    REBALANCE = "rebalance"
    SCALE = "scale"  # any operation, of which its record has the times
    UNKNOWN = "unknown"  # the epoch before is not known

    @classmethod
    def between(cls, before: Iterable[int], members: Iterable[int]) -> Trigger:
        """Of a change that no operation asked for, from the ranks before it and after it."""
        before, members = set(before), set(members)
        return cls.LOSS if before - members else cls.JOIN if members - before else cls.REBALANCE
