"""Arguments of the Ray Serve application: what stands under `args` in serve/chat.yaml."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from raytune_ft.errors import ServeError


class ServeArgs(BaseModel):
    """Arguments of the application; paths are on the replicas' machines."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(min_length=1)
    """Run folder, adapter, model folder, or `smollm2-135m-instruct`."""
    bits: int | None = None
    """4, 8, 16 or 32; null: the precision that training saw."""
    engine: Literal["auto", "embedded", "vllm"] = "auto"
    """What generates; auto: vLLM where it is installed and there is a GPU, else our own."""
    adapters: str | None = None
    """Folder of run folders or adapters of the same base: each is a model of its folder's name."""
    max_adapters: int = Field(default=4, ge=1, le=64)
    """Adapters in memory at once; the one that was not asked for the longest makes room."""
    slots: int | None = Field(default=None, ge=1, le=1024)
    """Requests that a replica answers at a time; null: by its device."""
    kv_gib: float | None = Field(default=None, gt=0)
    """GiB of a replica for keys and values; null: by its device."""

    hosts: list[str] = []
    """Host names, beside localhost, under which the endpoint is reached."""
    origins: list[Annotated[str, Field(pattern=r"^https?://[^/*\s]+$")]] = []
    """Other sites whose pages may ask (`https://chat.example`); none: no CORS at all."""
    keys: str | None = None
    """YAML file of API keys' names, hashes and limits, on the machine that deploys."""

    max_waiting: int = Field(default=16, ge=0, le=400)
    """Requests that wait at most in a replica; more are answered 429."""
    deadline_seconds: float = Field(default=600.0, gt=0, le=86_400)
    """For one answer, from its request to its last token."""
    drain_seconds: float = Field(default=30.0, ge=0, le=3_600)
    """For answers under way when a replica is taken away."""
    access_log: str | None = None
    """File for one JSON line per request; null: standard output, which Ray keeps."""
    log_prompts: bool = False
    """Whether those lines hold messages and answers."""

    min_replicas: int = Field(default=1, ge=1, le=1_000)
    max_replicas: int | None = Field(default=None, ge=1, le=1_000)
    """More than min_replicas: as many as the load asks for."""
    requests_per_replica: float = Field(default=16.0, gt=0)
    """Requests under way in a replica at which autoscaling aims."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of a replica; null: all cores that it may use."""
    cpus: float = Field(default=1.0, ge=0)
    """CPUs of a replica in Ray's books."""
    gpus: float | None = Field(default=None, ge=0)
    """GPUs of a replica; null: one if the cluster has one."""

    @model_validator(mode="after")
    def _ordered(self) -> ServeArgs:
        if self.max_replicas is not None and self.max_replicas < self.min_replicas:
            raise ValueError("max_replicas is less than min_replicas")
        return self

    @property
    def several(self) -> bool:
        """Whether there may be more than one replica."""
        return max(self.min_replicas, self.max_replicas or 1) > 1

    def scale(self) -> dict[str, Any]:
        """Return how many replicas there are, as Ray Serve's deployment options."""
        if self.max_replicas is None or self.max_replicas == self.min_replicas:
            return {"num_replicas": self.min_replicas}
        return {
            "autoscaling_config": {
                "min_replicas": self.min_replicas,
                "max_replicas": self.max_replicas,
                "target_ongoing_requests": self.requests_per_replica,
            }
        }


def checked(args: dict[str, Any]) -> ServeArgs:
    """Parse arguments.

    Raises:
        ServeError: one is unknown or out of bounds.
    """
    try:
        return ServeArgs.model_validate(args)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(("args", *(str(part) for part in first["loc"])))
        reason = str(first["msg"]).removeprefix("Value error, ")
        raise ServeError(f"{key}: {reason}; see serve/chat.yaml") from None
