"""Configuration: from flags to parsed, checked and saved gin bindings.

This is the only module that uses gin. The files under gin/ name the objects to
build (by dynamic registration, without decorators in the library) and bind one
root function, `cappa_tf.training.train.train`:

    parse(["gin/quickstart.gin"], ["TOTAL_STEPS=500"], workdir="runs/mine")
    run(on_start=save_config, on_first_step=save_operative_config)

gin alone does not detect four kinds of mistakes. `parse` catches all of them,
before anything is built or read: a misspelled macro, which to gin is a new
macro; an argument unknown to a class with **kwargs (every Keras class); a
binding in a scope that nothing uses; and values of a wrong type.
"""

import functools
import gc
import importlib.util  # noqa: F401  (gin's file search uses it unimported)
import io
import os
import pathlib
import re
import tokenize

import gin
from absl import flags

from cappa_tf import config_checks, config_moves
from cappa_tf.utils import files

ROOT = "cappa_tf.training.train.train"
PROBE_ROOT = "cappa_tf.training.linear_probe.linear_probe"
EVALUATION_ROOT = "cappa_tf.evaluation.evaluate.evaluate"
STUDY_ROOT = "cappa_tf.studies.comparison.compare"
STAGES_ROOT = "cappa_tf.training.stages.earlier_stages"
# A file may serve several roots, so a binding for another root is not an error.
_ROOTS = (ROOT, PROBE_ROOT, EVALUATION_ROOT, STAGES_ROOT)

# gin has no public API to list bindings, so pyproject.toml bounds its version.
_BINDINGS = gin.config._CONFIG


class ConfigError(ValueError):
    """The configuration is invalid; the message names the binding."""


def define_flags(runs=True, flag_values=flags.FLAGS):
    """Defines --gin_file, --gin_param and, for runs, --workdir, --dry_run."""
    flags.DEFINE_multi_string(
        "gin_file",
        [],
        "Configuration file, such as gin/quickstart.gin; repeatable, later "
        "files win.",
        flag_values=flag_values,
    )
    flags.DEFINE_multi_string(
        "gin_param",
        [],
        "Binding, such as \"DATA='data/mine'\"; repeatable, wins over files.",
        flag_values=flag_values,
    )
    if not runs:
        return
    flags.DEFINE_string(
        "workdir",
        None,
        "Folder of the run (WORKDIR); an existing run is resumed.",
    )
    flags.DEFINE_bool(
        "dry_run", False, "Build everything, print sizes, and stop."
    )


def parse_flags(**macros):
    """Parses the configuration that the flags of `define_flags` name.

    Args:
        **macros: Values of a tool's own flags, by macro; None if not given.

    Raises:
        SystemExit: With the `ConfigError`'s message and no traceback.
    """
    values = flags.FLAGS
    given = [f"{k} = {v!r}" for k, v in macros.items() if v is not None]
    params = values.gin_param + given
    try:
        parse(values.gin_file, params, workdir=values.workdir)
    except ConfigError as error:
        raise SystemExit(f"Configuration error: {error}") from None


# -- Parsing and running -------------------------------------------------------


def parse(gin_files, gin_params=(), workdir=None, root=None):
    """Parses and checks a configuration, and locks it.

    Args:
        gin_files: Paths relative to the working directory or to the folder of
            gin/ (the repository or the installed package); later files win.
        gin_params: Strings "NAME = VALUE", which win over files.
        workdir: Value of the macro WORKDIR, or None.
        root: Full name of the root function; None for the one of training
            that the files bind.

    Raises:
        ConfigError: If nothing binds the root, a file cannot be found or
            parsed, or a binding is misspelled, missing, of a wrong type or
            without effect, in the configuration of any stage.
    """
    _parse(gin_files, gin_params, workdir, root)
    bound = root or bound_root()
    if bound == ROOT and ("", STAGES_ROOT) in _BINDINGS:
        given = (gin_files, gin_params)
        found = [_parse_part(part, *given) for part in _parts()]
        if found:
            _parse(*given, workdir, root)


def _parse(gin_files, gin_params, workdir, root, part=None):
    """`parse` of a run, or of the `stages.Part` of one, without its stages."""
    if isinstance(gin_files, str) or isinstance(gin_params, str):
        given = f"gin_files={gin_files!r}, gin_params={gin_params!r}"
        raise ValueError(f"Files and params must be lists. Received: {given}")
    if not gin_files:
        raise ConfigError(
            f"Give a --gin_file. Shipped with this program: {_shipped()}."
        )
    gin.clear_config()
    gin_root()
    used = set()
    wanted = () if root is None else (root,)
    for path in gin_files:
        for current in config_moves.files_for(path):
            _parse_file(current)
        # Bindings that a later file replaces (another optimizer) count as used.
        for one in {*wanted, *_ROOTS}:
            used |= _Walk(one).used
    params = list(gin_params)
    if workdir is not None:
        params.append(f"WORKDIR = {str(workdir)!r}")
    given = [_parse_param(param) for param in params]
    if part is not None:
        # They are checked where they matter, in the configuration of the run.
        used = used | set(given)
        given = [_parse_param(line) for line in part.stage.lines()]
        _bind_part(part, workdir)
    _check(root or bound_root(), used, given, part is not None)
    gin.finalize()
    _given.clear()
    _given.update(gin_files=gin_files, gin_params=gin_params, workdir=workdir)


def bound_root():
    """Full name of the root function of training that is bound."""
    # An evaluation's file binds arguments of `train.train` in any case.
    return PROBE_ROOT if ("", PROBE_ROOT) in _BINDINGS else ROOT


def run(root=None, **kwargs):
    """Calls the root function with the parsed configuration.

    A run with stages (`training/stages.py`) is a call for each of them that
    is not over, with its own configuration.

    Args:
        root: Full name of the root function, as given to `parse`.
        **kwargs: Arguments that are not configured, such as `dry_run`.

    Returns:
        The result of the root function; of the last stage, or the one that
        was interrupted.
    """
    root = root or bound_root()
    parts = _parts() if root == ROOT else []
    if not parts:
        return gin.get_configurable(root)(**kwargs)
    given = dict(_given)
    wanted = kwargs.pop("profile", None)
    spans = [(part.first_step, part.last_step) for part in parts]
    spans.append((parts[-1].last_step, _total_steps()))
    if wanted and not any(_within(wanted, *span) for span in spans):
        raise ValueError(
            "`profile` must be steps of one stage of the run. Received: "
            f"profile={tuple(wanted)}, stages that end at "
            f"{', '.join(str(last) for _, last in spans)}"
        )
    dry_run = kwargs.get("dry_run", False)
    for part, span in zip(parts, spans):
        if part.is_over() and not dry_run:
            continue
        _parse_part(part, given["gin_files"], given["gin_params"])
        kwargs["profile"] = _within(wanted, *span)
        if dry_run:
            print(f"Stage of {span[1] - span[0]} steps")
            kwargs["continue_from"] = None
        figures = gin.get_configurable(ROOT)(**kwargs)
        if figures.get("interrupted"):
            return figures
        # What the stage has built would take the memory of the next.
        gc.collect()
    _parse(**given, root=None)
    if not dry_run:
        kwargs["continue_from"] = parts[-1].folder
    else:
        print(f"Last stage, of {spans[-1][1] - spans[-1][0]} steps")
    kwargs["profile"] = _within(wanted, *spans[-1])
    return gin.get_configurable(ROOT)(**kwargs)


def stage_arguments():
    """The shares of the stages of a parsed run, and their arguments.

    Yields:
        (share of the steps, dict of `arguments`) for each stage; the whole run
        if it has none. The configuration is parsed anew for each of them, and
        is that of the run in the end.
    """
    if bound_root() != ROOT:
        yield 1.0, arguments()
        return
    given, total = dict(_given), _total_steps()
    done = 0
    for part in _parts():
        _parse_part(part, given["gin_files"], given["gin_params"])
        yield (part.last_step - done) / total, arguments()
        done = part.last_step
    if done:
        _parse(**given, root=None)
    yield (total - done) / total, arguments()


def _within(steps, first, last):
    """The steps to profile, if they are after `first` and up to `last`."""
    return steps if steps and first < steps[0] and steps[1] <= last else None


def _parts():
    """The `stages.Part`s of the parsed run; none if it has no stages."""
    if ("", STAGES_ROOT) not in _BINDINGS:
        return []
    from cappa_tf.training import stages

    try:
        return stages.parts(
            gin.get_configurable(STAGES_ROOT)(),
            _total_steps(),
            _resolve(_BINDINGS["", ROOT]["workdir"])[0],
        )
    except ValueError as error:
        raise ConfigError(_without_gin(error)) from error


def _without_gin(error):
    """An error's message without the lines that gin adds."""
    return str(error).partition("\n  In call to")[0]


def _total_steps():
    settings = _BINDINGS.get(("", f"{config_moves.SETTINGS}.RunSettings"), {})
    return _resolve(settings.get("total_steps"))[0]


def _parse_part(part, gin_files, gin_params):
    """Parses the configuration of an earlier stage, that of a run."""
    try:
        _parse(gin_files, gin_params, part.folder, None, part)
    except ConfigError as error:
        name = os.path.basename(part.folder)
        raise ConfigError(f"In {name}: {error}") from error


def _bind_part(part, folder):
    """Binds what makes a run an earlier stage of another."""
    gin.parse_config(
        "from __gin__ import dynamic_registration\n"
        "from cappa_tf.training import settings\n"
        "from cappa_tf.training import train\n"
        f"train.train.continue_from = {part.before!r}\n"
        f"train.train.log_folder = {os.path.dirname(folder)!r}\n"
        f"settings.RunSettings.total_steps = {part.last_step}\n"
        "settings.EvaluationSettings.final_evaluation = False\n"
    )


def arguments(root=None):
    """Builds the arguments that `run` would pass to the root function.

    Returns:
        A dict including defaults. Arguments that the files reference without
        "()" (`model`, `optimizer`) are constructors that must still be called.
    """
    root = root or bound_root()
    function = gin.config._REGISTRY[root].wrapped
    named, _ = config_checks.parameters(function)
    defaults = {
        name: parameter.default
        for name, parameter in named.items()
        if parameter.default is not parameter.empty
    }
    return {**defaults, **gin.get_bindings(root)}


def load_run(workdir, gin_params=(), root=None):
    """Parses the configuration that a run saved in its workdir.

    Args:
        workdir: Folder of the run, which may have been moved.
        gin_params: Strings "NAME = VALUE", for example for moved data.
        root: Full name of the root function.

    Returns:
        The dict of `arguments`, whose constructors must be called before
        another `parse`.

    Raises:
        ConfigError: If there is no config.gin, or `parse` refuses it.
    """
    path = os.path.join(files.absolute(workdir), "config.gin")
    if not files.isfile(path):
        raise ConfigError(f"No configuration of a run was found: {path}")
    parse([path], gin_params, workdir=workdir, root=root)
    return arguments(root)


# -- Saving --------------------------------------------------------------------


def save_config(workdir):
    """Writes the parsed bindings to WORKDIR/config.gin, on the chief."""
    files.write_text(os.path.join(workdir, "config.gin"), gin.config_str())


def save_operative_config(workdir, step):
    """Writes all values in use, including defaults, to the run's folder.

    gin knows a value only after its constructor has been called, so this must
    be called after the first step, on the chief.

    Args:
        workdir: Folder of the run.
        step: Number of finished steps, for the name of the file.
    """
    path = os.path.join(workdir, f"operative_config-{step}.gin")
    files.write_text(path, gin.operative_config_str())


@functools.cache
def gin_root():
    """The folder that contains gin/, of a checkout or an installed wheel.

    Its files are then found from any working directory. Files there come
    first, so that users can override the shipped ones.
    """
    package = pathlib.Path(__file__).resolve().parent
    for folder in (package.parent, package):
        if (folder / "gin" / "sizes" / "b16.gin").is_file():
            gin.add_config_file_search_path(str(folder))
            return folder
    raise ConfigError(f"The folder gin/ is missing beside or in {package}.")


def _shipped():
    names = sorted((gin_root() / "gin").glob("*.gin"))
    return ", ".join(f"gin/{path.name}" for path in names)


_parse_key = gin.config.ParsedBindingKey.parse


def _parse_moved_key(key):
    """Parses a binding's key; a moved argument gets its current key.

    gin calls this for each binding of a file, in a block or not, and of the
    command line. The old name was an argument of the root function, and no file
    of version 0.1.0 binds the object that now has it, so it is bound here.

    Args:
        key: "scope/module.name.argument", or these three separately.
    """
    if isinstance(key, str):
        key = gin.config_parser.parse_binding_key(key)
    name = key[-1]
    configurable = gin.config._parse_context().get_configurable(key[1])
    if configurable is not None and configurable.selector == ROOT:
        for (cls, argument), moved in config_moves.MOVED_ARGUMENTS.items():
            if name in moved.split():
                _bind_settings(cls, argument)
                selector = f"{config_moves.SETTINGS}.{cls}"
                return gin.config.ParsedBindingKey(
                    key[0], key[1], selector, name
                )
    return _parse_key(key)


def _bind_settings(cls, argument):
    """Binds an object of the class to the root function, unless bound."""
    if argument not in _BINDINGS.get(("", ROOT), {}):
        gin.parse_config(
            "from __gin__ import dynamic_registration\n"
            "from cappa_tf.training import settings\n"
            "from cappa_tf.training import train\n"
            f"train.train.{argument} = @settings.{cls}()"
        )


gin.config.ParsedBindingKey.parse = _parse_moved_key


# What size files set: a method reads those of their numbers that it has.
_SIZE_MACROS = set()


class _GinFile(io.StringIO):
    """A gin file with current names; its own appears in gin's messages."""

    def __init__(self, path):
        text = config_moves.updated(files.read_text(path))
        if os.path.basename(os.path.dirname(path)) == "sizes":
            _SIZE_MACROS.update(re.findall(r"^(\w+) *=", text, re.MULTILINE))
        super().__init__(text)
        self.name = path


# Inserted before gin's own readers, so that it also reads included files.
gin.config._FILE_READERS.insert(0, (_GinFile, files.isfile))


def _parse_file(path):
    try:
        gin.parse_config_file(path)
    except OSError as error:
        raise ConfigError(
            f"--gin_file={path}: {error} Shipped are {_shipped()}."
        ) from None
    except Exception as error:
        raise ConfigError(f"--gin_file={path}: {_reason(error)}") from error


def _parse_param(param):
    """Parses one "NAME = VALUE"; returns the key of the binding."""
    param = config_moves.renamed(param)
    name, equals, value = param.partition("=")
    name = name.strip()
    if not (name and equals and value.strip()):
        raise ConfigError(
            f"--gin_param must be NAME=VALUE. Received: {param!r}"
        )
    try:
        gin.parse_config(param)
        if "." not in name:
            return (name, "gin.macro")
        return gin.config.ParsedBindingKey.parse(name).config_key
    except (SyntaxError, tokenize.TokenError) as error:
        raise ConfigError(
            f"--gin_param={param}: values are Python literals, so strings "
            f"need quotes inside the quotes: --gin_param=\"{name}='...'\". "
            f"({_reason(error)})"
        ) from None
    except Exception as error:
        raise ConfigError(f"--gin_param={param}: {error}") from error


def _reason(error):
    """Message of gin's parser, with the line."""
    if isinstance(error, tokenize.TokenError):  # since Python 3.12
        reason, (line, _) = error.args
        return f"{reason} (line {line})"
    return str(error)


# -- Checks --------------------------------------------------------------------


def _check(root, used, given, in_stage):
    """Raises ConfigError for bindings that would fail or have no effect.

    Args:
        root: Full name of the root function.
        used: Keys of bindings that had an effect after some file.
        given: Keys of the bindings on the command line.
        in_stage: Whether it is the configuration of an earlier stage, which
            has no stages itself.
    """
    walk = _Walk(root)
    if root == ROOT and not in_stage:
        of_stages = _Walk(STAGES_ROOT)
        walk.used |= of_stages.used
        walk.problems |= of_stages.problems
    if not walk.found_root:
        raise ConfigError(
            f"No --gin_file binds {root}; start from one of {_shipped()}."
        )
    unread = [key for key in (*_BINDINGS, *given) if key not in walk.used]
    used = used | {(name, "gin.macro") for name in _SIZE_MACROS}
    ineffective = [key for key in unread if key in given or key not in used]
    problems = [_no_effect(key, walk) for key in dict.fromkeys(ineffective)]
    problems += walk.problems.values()
    if problems:
        raise ConfigError("\n  ".join(["", *problems]).strip())
    # Saved files must parse again without the files that were overridden.
    for key in unread:
        _BINDINGS.pop(key, None)


def _no_effect(key, walk):
    """The message for a binding that nothing reads, with a suggestion."""
    scope, selector = key
    name = _key_name(key)
    guess = config_checks.guess(name, [_key_name(other) for other in walk.used])
    if selector == "gin.macro":
        return f"{name} is set, but nothing in this run reads it.{guess}"
    bound = f"{name} ({', '.join(_BINDINGS.get(key, ()))}) is bound"
    return f"{bound}, but not used in this run.{guess}"


def _key_name(key):
    """Name of a key as in the files: MACRO or scope/module.Class."""
    scope, selector = key
    short = ".".join(selector.split(".")[-2:])
    named = [scope] if selector == "gin.macro" else [scope, short]
    return "/".join(filter(None, named))


class _Walk:
    """All bindings that a run reads, found without building anything.

    Bindings apply only to objects that the files reference, so following the
    references from the root visits exactly the constructors that a run calls
    through gin.

    Attributes:
        found_root: Whether anything binds the root.
        used: Keys (scope, selector) of bindings that are read.
        problems: Dict of messages about missing, unknown and wrongly typed
            arguments.
    """

    def __init__(self, root):
        self.used = set()
        self.problems = {}
        self._visited = set()
        self.found_root = ("", root) in _BINDINGS
        if self.found_root:
            self._visit((), gin.config._REGISTRY[root], True)

    def _visit(self, scopes, configurable, evaluated):
        """Checks the call of a configurable inside the scopes."""
        if (scopes, configurable.selector) in self._visited:
            return
        self._visited.add((scopes, configurable.selector))
        bound, origin = {}, {}
        for i in range(len(scopes) + 1):
            key = ("/".join(scopes[:i]), configurable.selector)
            if key in _BINDINGS:
                self.used.add(key)
                bound.update(_BINDINGS[key])
                origin.update(dict.fromkeys(_BINDINGS[key], key))
        for name, value in bound.items():
            self._follow(scopes, value, f"{_key_name(origin[name])}.{name}")
        short = _key_name(("/".join(scopes), configurable.selector))
        self._check_call(short, configurable.wrapped, bound, evaluated)

    def _follow(self, scopes, value, reader):
        """Visits the references inside a bound value."""
        for reference in gin.config.iterate_references({"": value}):
            inner = tuple(reference.scopes) or scopes
            if _is_macro(reference):
                self._follow_macro(inner, reader)
            elif reference.configurable.selector != "gin.constant":
                self._visit(inner, reference.configurable, reference.evaluate)
                if not reference.evaluate and not reference.scopes:
                    # It is called later, possibly outside of these scopes.
                    self._visit((), reference.configurable, False)

    def _follow_macro(self, scopes, reader):
        """Visits the value of a macro that `reader` refers to."""
        key = ("/".join(scopes), "gin.macro")
        if key in _BINDINGS:
            self.used.add(key)
            self._follow(scopes, _BINDINGS[key]["value"], scopes[-1])
        else:
            self._problem(
                f"{key[0]} is missing: {reader} reads it. Set it with "
                f'--gin_param="{key[0]}=..." or in a gin file.'
            )

    def _check_call(self, short, function, bound, evaluated):
        """Checks names, types and presence of the arguments of one call."""
        known, labels = {}, {}
        for name, bound_value in bound.items():
            value, macros = _resolve(bound_value)
            if macros:
                labels[name] = macros[-1]
            known[name] = value
            if value is gin.REQUIRED:
                setting = macros[-1] if macros else f"{short}.{name}"
                self._problem(
                    f"{setting} must be set (it is {short}.{name}): for "
                    f"example --gin_param=\"{setting}='...'\".",
                    setting,
                )
                known[name] = config_checks.UNKNOWN
            # An object that gin builds, or a tuple with such parts.
            if any(gin.config.iterate_references({"": value})):
                known[name] = config_checks.UNKNOWN
        # A constructor that is only referenced may get further arguments.
        for problem in config_checks.problems(
            short, function, known, labels, complete=evaluated
        ):
            self._problem(problem)

    def _problem(self, message, key=None):
        """Keeps one message per key; by default the message is its key."""
        self.problems.setdefault(key or message, message)


# Arguments of the last `_parse`.
_given = {}


def _resolve(value):
    """The value after resolving macros, and the names of these macros."""
    macros = []
    while isinstance(value, gin.config.ConfigurableReference):
        if value.configurable.selector == "gin.constant":
            return value.scoped_configurable_fn(), macros
        name = "/".join(value.scopes)
        # A cycle of macros ends here; gin reports it when it is read.
        if not _is_macro(value) or name in macros:
            break
        macros.append(name)
        value = _BINDINGS.get((name, "gin.macro"), {"value": value})["value"]
    return value, macros


def _is_macro(reference):
    return reference.configurable.selector == "gin.macro"
