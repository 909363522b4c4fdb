"""The engine Ray: actors tokenize the clips of a data set, on this machine or on a cluster.

An actor loads the model once. A task is one clip, or a group of clips where several go through the model at once. An actor that is idle
gets the next task, whichever shard it is of, so that no actor waits for a slower one. It writes token files and notes as the default
engine does. This process, the driver, takes the locks of the shards and packs a shard when all of its files are noted. So the folder
tells at any moment what is done, and survives a kill of an actor, of its machine and of the driver.

An actor that dies is replaced. A clip whose actors died three times while they had no other clip is listed as bad.
"""

import contextlib
import functools
import logging
import os
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from elastic.io.atomic import locked
from elastic.media.location import Place
from elastic.pipeline.clip_files import ClipResult, ClipTask, Notes, tokenize_clips
from elastic.pipeline.contact_sheet import Sample, sample_clips
from elastic.pipeline.dataset import Progress, check_inputs, identity
from elastic.pipeline.dataset_shards import Outcome, Shards
from elastic.pipeline.engine_options import EngineOptions
from elastic.pipeline.shard_numbers import ListedClip
from elastic.tokenizer import ElasticTokenizer, EncodeOptions

log = logging.getLogger(__name__)

_MOST_CRASHES = 3  # of the actors that tokenize a clip, before the clip is listed as bad
_MOST_IN_A_ROW = (
    10  # clips given up without any that was tokenized in between: then it is not the clips
)
_MOST_FAILED_STARTS = 3  # in a row
_GROUP_BATCHES = 4  # batches in a task; fewer where few clips are left
_PATIENCE_SECONDS = 60.0  # until the log says that no actor has started
_STORE_BYTES = 100_000_000  # of an embedded cluster; tasks and results are small
_MOST_STARTS = 3  # of an embedded cluster whose processes are late; Ray gives them 30 seconds
# How long an embedded cluster waits for its own processes. Ray's usual waits end a start on a machine with other work.
_WAITS = {
    "RAY_agent_register_timeout_ms": "300000",
    "RAY_worker_register_timeout_seconds": "300",
    "RAY_health_check_initial_delay_ms": "60000",
    "RAY_health_check_failure_threshold": "20",
}


class _Place(NamedTuple):
    """Where an actor runs: the working folder of the driver, and on the driver's machine the share of cores."""

    folder: str
    cpu_devices: int | None = None
    cores: tuple[int, ...] = ()


def tokenize_dataset(
    load: Callable[[], ElasticTokenizer],
    inputs: Mapping[str, Place],
    folder: str | Path,
    options: EncodeOptions,
    *,
    engine: EngineOptions | None = None,
    files_per_shard: int = 64,
    batch: int = 1,
    append: bool = False,
    progress: bool = True,
    verbose: bool = False,
) -> Outcome:
    """As `dataset.tokenize_dataset`, with actors of Ray: the same shards, plan, summary and list of bad files.

    Either engine goes on with what the other one has begun.

    Args:
      load: gives the model; it is called once in each actor, and must be picklable.
      inputs: {id: file}, as `list_inputs` gives them. Every machine of the cluster must see the files, and `folder`, at the same place.
      folder: the folder of the shards; it is made if it does not exist.
      options: which frames are read, and how the token counts are chosen.
      engine: where the actors run; None: on this machine.
      files_per_shard: files in a shard; the last shard may have fewer.
      batch: clips that go through the model of an actor together.
      append: tokenize files that the folder has gained since the run began, as further shards; False refuses them.
      progress: show a progress bar with the rate and the remaining time.
      verbose: show what Ray and the actors log.

    Raises:
      ValueError: Ray is missing or cannot be started, the options contradict each other, or the folder holds another run's shards.
      OSError: the folder cannot be written to.
    """
    engine = engine or EngineOptions(engine="ray")
    check_inputs(inputs, options)
    try:
        with _cluster(engine, verbose=verbose) as embedded:
            actors = _Actors(load, options, batch, engine, embedded=embedded, verbose=verbose)
            model, settings = actors.first_identity()
            shards = Shards.open_run(
                inputs,
                Path(folder),
                files_per_shard=files_per_shard,
                model=model,
                options=settings,
                append=append,
            )
            numbers = range(shards.plan.num_shards)
            with Progress(shards, numbers, shown=progress, models=actors.number) as bar:
                # Once more at the end, as in the default engine.
                for _ in range(2):
                    _Driver(shards, actors, bar, batch).run(numbers)
            return shards.close_run(functools.partial(actors.draw, inputs))
    except (KeyboardInterrupt, SystemExit):
        log.warning("Stopped; the same command goes on from here.")
        raise


class ClipActor:
    """One model, which tokenizes the clips that it is given. Runs in a process of Ray.

    Args:
      load: gives the model.
      options: which frames are read, and how the token counts are chosen.
      batch: clips that go through the model together.
      place: where it runs.
      verbose: show the log.
    """

    def __init__(
        self,
        load: Callable[[], ElasticTokenizer],
        options: EncodeOptions,
        batch: int,
        place: _Place,
        verbose: bool,
    ):
        self._load, self._options, self._batch = load, options, batch
        self._place, self._verbose = place, verbose

    def start(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Loads the model, and gives `dataset.identity`, which has to be that of all actors."""
        if self._verbose:
            logging.basicConfig(level=logging.INFO, format="%(message)s")
        if not os.path.isdir(self._place.folder):
            raise ValueError(
                f"{os.uname().nodename} has no folder {self._place.folder}; start where every machine of the cluster sees the same files."
            )
        os.chdir(self._place.folder)  # names of files may be relative
        if self._place.cpu_devices is not None:
            os.environ.setdefault("JAX_NUM_CPU_DEVICES", str(self._place.cpu_devices))
        if self._place.cores:
            os.sched_setaffinity(0, self._place.cores)
        self._tokenizer = self._load()
        return identity(self._tokenizer, self._options)

    def tokenize(self, tasks: Sequence[ClipTask]) -> list[tuple[ClipTask, ClipResult]]:
        """Writes the token files and the notes of some clips."""
        with contextlib.ExitStack() as locks:

            def held() -> Iterator[ClipTask]:
                for task in tasks:
                    # An actor whose driver was killed, or which the driver takes for dead, may live on for a moment.
                    locks.enter_context(locked(task.folder / f"{task.number:05d}.lock", wait=True))
                    yield task

            done = tokenize_clips(self._tokenizer, held(), self._options, batch=self._batch)
            return list(done)

    def draw(
        self, inputs: Mapping[str, Place], folder: Path, clips: Sequence[ListedClip]
    ) -> list[Sample]:
        """The first frames of clips, for the summary."""
        return sample_clips(self._tokenizer, inputs, self._options, folder, clips)


@contextlib.contextmanager
def _cluster(engine: EngineOptions, *, verbose: bool) -> Iterator[bool]:
    """Joins a cluster or starts one, and leaves it at the end; gives True for a cluster that was started here."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray is imported
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray  # pyright: ignore[reportMissingImports]

    if ray.is_initialized():  # by the program that calls this
        yield False
        return
    address = engine.ray_address or os.environ.get("RAY_ADDRESS") or "local"
    embedded = address == "local"
    if embedded:
        for name, value in _WAITS.items():
            os.environ.setdefault(name, value)
    own: dict[str, Any] = {"include_dashboard": False, "object_store_memory": _STORE_BYTES}
    handler = signal.getsignal(signal.SIGTERM)
    try:
        try:
            for left in reversed(range(_MOST_STARTS if embedded else 1)):
                try:
                    ray.init(
                        address=address,
                        log_to_driver=verbose,
                        logging_level=logging.INFO if verbose else logging.ERROR,
                        **own if embedded else {},
                    )
                    break
                except Exception as error:
                    # Where a process of Ray is late, Ray raises an `Exception`, of no class of its own.
                    is_late = type(error) is Exception
                    if not is_late and not isinstance(error, OSError | RuntimeError | ValueError):
                        raise
                    if not (is_late and left):
                        raise ValueError(_not_started(address, error)) from error
                    log.info("Ray is started again: %s", " ".join(str(error).split())[:200])
                    ray.shutdown()
        finally:
            with contextlib.suppress(ValueError):  # not in the main thread
                signal.signal(signal.SIGTERM, handler)  # which Ray has replaced by its own
        yield embedded
    finally:
        ray.shutdown()


def _not_started(address: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:200].rstrip(".")
    if address == "local":
        return (
            f"Ray could not start on this machine: {reason}. Start again when the machine is less busy, or start it with "
            "`ray start --head` and give --ray_address=auto."
        )
    return (
        f"--ray_address={address}: Ray cannot be reached: {reason}. Start it with `ray start --head`, or leave the address out "
        "for a cluster of this machine alone."
    )


def _resources(
    cluster: Mapping[str, float], asked: int, *, embedded: bool
) -> tuple[int, dict[str, Any]]:
    """The number of actors, and what each takes of the cluster, as options of Ray.

    Args:
      cluster: what the cluster has, such as {'CPU': 8.0, 'GPU': 2.0}.
      asked: the number of actors; 0: the default.
      embedded: whether the cluster is this machine's alone, and has no more to come.
    """
    cpus = max(1.0, cluster.get("CPU", 1.0))
    for kind in ("GPU", "TPU"):
        have = int(cluster.get(kind, 0))
        if have and os.environ.get("JAX_PLATFORMS", "").partition(",")[0] != "cpu":
            if embedded and asked > have:
                raise ValueError(
                    f"ray_actors={asked}: there are {have} {kind}s, and an actor takes one; give at most {have}."
                )
            number = asked or have
            share = {"num_gpus": 1} if kind == "GPU" else {"resources": {"TPU": 1}}
            return number, share | {"num_cpus": min(1.0, cpus / number)}
    number = asked or max(1, int(cpus) // 2)
    return number, {"num_cpus": min(2.0, _part(cpus / number)) if embedded else min(2.0, cpus)}


def _part(cpus: float) -> float:
    """Ray takes whole numbers above 1."""
    return float(int(cpus)) if cpus > 1 else cpus


class _Actors:
    """The actors of a run, and the tasks that each is at.

    Args:
      load, options, batch: those of `ClipActor`.
      engine: where they run.
      embedded: whether the cluster is this machine's alone.
      verbose: show what they log.
    """

    def __init__(
        self,
        load: Callable[[], ElasticTokenizer],
        options: EncodeOptions,
        batch: int,
        engine: EngineOptions,
        *,
        embedded: bool,
        verbose: bool,
    ):
        import ray  # pyright: ignore[reportMissingImports]

        self._ray: Any = ray
        resources = ray.cluster_resources()
        self.number, self._takes = _resources(resources, engine.ray_actors, embedded=embedded)
        # One task at a time; a task is not repeated by Ray, because the driver counts what has crashed.
        self._class = ray.remote(ClipActor).options(max_restarts=0, **self._takes)
        self._arguments = ray.put(load), ray.put(options), batch
        self._verbose, self._embedded = verbose, embedded
        self._identity: tuple[dict[str, Any], dict[str, Any]] | None = None
        self._starting: dict[Any, tuple[Any, int]] = {}  # what `start` will give: actor, its number
        self._idle: deque[tuple[Any, int]] = deque()
        self._busy: dict[Any, tuple[Any, int, list[ClipTask]]] = {}
        self._failed_starts = 0
        where = "this machine" if embedded else "the cluster"
        takes = ", ".join(f"{name}={value}" for name, value in self._takes.items())
        log.info("Ray: %d actors on %s, each with %s.", self.number, where, takes)
        for number in range(self.number):
            self._add(number)

    def _add(self, number: int) -> None:
        actor = self._class.remote(*self._arguments, self._place(number), self._verbose)
        self._starting[actor.start.remote()] = actor, number

    def _place(self, number: int) -> _Place:
        folder = os.getcwd()
        if not self._embedded or set(self._takes) != {"num_cpus"}:
            return _Place(folder)
        from elastic.distributed.cpu_devices import num_cpu_devices

        # As many devices as the default engine has, because the rows depend on it; XLA's threads on the actor's own cores.
        cores = sorted(os.sched_getaffinity(0))
        first, end = (len(cores) * n // self.number for n in (number, number + 1))
        return _Place(folder, num_cpu_devices(), tuple(cores[first:end]))

    def first_identity(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Waits for the first actor, and gives what its tokens depend on."""
        while self._identity is None:
            self._wait_for_any()
        return self._identity

    @property
    def num_idle(self) -> int:
        """The number of actors that have nothing to do."""
        return len(self._idle)

    @property
    def are_busy(self) -> bool:
        """Whether an actor has a task."""
        return bool(self._busy)

    def give(self, tasks: Sequence[ClipTask]) -> None:
        """Gives tasks to an idle actor."""
        actor, number = self._idle.popleft()
        self._busy[actor.tokenize.remote(list(tasks))] = actor, number, list(tasks)

    def draw(
        self, inputs: Mapping[str, Place], folder: Path, clips: Sequence[ListedClip]
    ) -> list[Sample]:
        """The first frames of clips, from an actor that has nothing to do; none if it dies over them."""
        while not self._idle:
            self._wait_for_any()
        there = {clip.id: inputs[clip.id] for clip in clips if clip.id in inputs}
        return self._get(self._idle[0][0].draw.remote(there, folder, list(clips))) or []

    def wait(self) -> Iterator[tuple[list[ClipTask], list[tuple[ClipTask, ClipResult]] | None]]:
        """Waits until something has happened; gives the tasks that have ended with their results, or with None if their actor died."""
        for ref in self._wait_for_any():
            actor, number, tasks = self._busy.pop(ref)
            results = self._get(ref)
            if results is None:
                log.warning(
                    "An actor died while it tokenized %s; another one takes its place.",
                    tasks[0].name if len(tasks) == 1 else f"{len(tasks)} clips",
                )
                self._replace(actor, number)
            else:
                self._idle.append((actor, number))
            yield tasks, results

    def _wait_for_any(self) -> list[Any]:
        """Waits until an actor has started, which is seen to here, or has ended a task; gives the refs of the latter."""
        refs = [*self._starting, *self._busy]
        ready, _ = self._ray.wait(refs, timeout=_PATIENCE_SECONDS)
        if not ready and not self._busy:
            log.warning(
                "No actor is ready yet: it loads the model, or waits for what it takes of the cluster, %s. Free now: %s.",
                self._takes,
                {
                    name: self._ray.available_resources().get(name, 0)
                    for name in ("CPU", "GPU", "TPU")
                },
            )
        for ref in [ref for ref in ready if ref in self._starting]:
            actor, number = self._starting.pop(ref)
            found = self._get(ref)
            if found is None:
                self._failed_starts += 1
                if self._failed_starts == _MOST_FAILED_STARTS:
                    raise ValueError(
                        f"{_MOST_FAILED_STARTS} actors in a row died while they loaded the model, perhaps for want of memory; "
                        "give --ray_actors= less, and see the log files of Ray, or --verbose."
                    )
                self._replace(actor, number)
                continue
            self._failed_starts = 0
            self._identity = self._identity or found
            if found != self._identity:
                raise ValueError(
                    f"Actors have different models or settings: {found}, but {self._identity} before. Let every machine of the cluster "
                    "load the same files."
                )
            self._idle.append((actor, number))
        return [ref for ref in ready if ref in self._busy]

    def _replace(self, actor: Any, number: int) -> None:
        """Makes another actor in the place of one that died, or that cannot be reached."""
        self._ray.kill(actor)
        self._add(number)

    def _get(self, ref: Any) -> Any:
        """The result of a call; None: its actor died. An error that the call raised is raised here."""
        try:
            return self._ray.get(ref)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, ValueError | OSError):
                raise error.cause from error
            raise
        except self._ray.exceptions.RayError as error:
            log.debug("%s", error)
            return None


class _Open(NamedTuple):
    """A shard under way: its number, what holds its lock, and its files that are not done."""

    shard: int
    lock: contextlib.ExitStack
    left: set[int]


class _Driver:
    """Gives the clips of shards to actors, and packs the shards.

    Args:
      shards: the shards of the run.
      actors: who tokenizes.
      bar: counts what is done.
      batch: clips that go through the model of an actor together.
    """

    def __init__(self, shards: Shards, actors: _Actors, bar: Progress, batch: int):
        self._shards, self._actors, self._bar, self._batch = shards, actors, bar, batch
        self._open: dict[Path, _Open] = {}
        self._waiting: deque[ClipTask] = deque()
        self._alone: deque[ClipTask] = deque()  # whose actor died; each is tried with no other clip
        self._crashes: Counter[tuple[Path, int]] = Counter()
        self._given_up = 0  # clips in a row

    def run(self, numbers: Sequence[int]) -> None:
        """Finishes shards, but for those that another process holds."""
        coming = iter(numbers)
        try:
            while True:
                self._fill(coming)
                while self._actors.num_idle and (tasks := self._next_tasks()):
                    self._actors.give(tasks)
                if not (self._open or self._actors.are_busy):
                    return
                for tasks, results in self._actors.wait():
                    if results is None:
                        self._note_crash(tasks)
                    else:
                        self._note_results(results)
        finally:
            for opened in self._open.values():
                opened.lock.close()

    def _fill(self, coming: Iterator[int]) -> None:
        """Opens shards until there is enough to give out."""
        wanted = self._actors.number * self._batch * (_GROUP_BATCHES if self._batch > 1 else 1)
        while len(self._waiting) < wanted and (shard := next(coming, None)) is not None:
            lock = contextlib.ExitStack()
            if not lock.enter_context(self._shards.held(shard)):
                lock.close()
                continue
            self._open[self._shards.work_folder(shard)] = _Open(shard, lock, set())
            self._begin(self._shards.work_folder(shard))

    def _begin(self, folder: Path) -> None:
        """Queues the files of a shard that are not done, or packs it if all are."""
        opened = self._open[folder]
        while not (todo := self._shards.todo(opened.shard)):
            if self._shards.pack(opened.shard):
                self._open.pop(folder).lock.close()
                return
        opened.left.update(task.number for task in todo)
        self._waiting.extend(todo)

    def _next_tasks(self) -> list[ClipTask]:
        """The tasks for an idle actor; [] if there are none."""
        if self._alone:
            return [self._alone.popleft()]
        size = self._batch
        if size > 1:  # large groups first, small ones at the end
            share = len(self._waiting) // (2 * self._actors.number)
            size = min(_GROUP_BATCHES * size, max(size, share))
        return [self._waiting.popleft() for _ in range(min(size, len(self._waiting)))]

    def _note_results(self, results: Sequence[tuple[ClipTask, ClipResult]]) -> None:
        self._given_up = 0
        for task, result in results:
            if self._shards.take(task, result):
                self._bar.add(result)
            self._end(task)

    def _note_crash(self, tasks: Sequence[ClipTask]) -> None:
        """Sees to tasks whose actor died: some may be done; one that was alone may be given up."""
        unfinished = [task for task in tasks if Notes.load(task.folder, task.number) is None]
        for task in tasks:
            if task not in unfinished:
                self._bar.add(ClipResult(0))
                self._end(task)
        if len(tasks) > 1:
            self._alone.extend(unfinished)
            return
        for task in unfinished:
            key = task.folder, task.number
            self._crashes[key] += 1
            if self._crashes[key] < _MOST_CRASHES:
                self._alone.append(task)
                continue
            self._given_up += 1
            if self._given_up == _MOST_IN_A_ROW:
                raise ValueError(
                    f"{_MOST_IN_A_ROW} clips in a row ended their actors, the last one {task.name}: something else than the clips may be "
                    "wrong, such as memory or a device. The log files of Ray, or --verbose, say more; the same command goes on."
                )
            self._shards.give_up(
                task,
                f"{str(task.source)!r} ended the process that tokenizes it, {_MOST_CRASHES} times; convert it or leave it out.",
            )
            self._bar.add(ClipResult(0))
            self._end(task)

    def _end(self, task: ClipTask) -> None:
        """Notes that a file is no longer under way. The last one of its shard has the shard packed."""
        left = self._open[task.folder].left
        left.discard(task.number)
        if not left:
            self._begin(task.folder)
