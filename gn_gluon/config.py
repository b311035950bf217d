"""Gin files and bindings: where a file is found, what may be bound, what a run really used.

The one module that talks to gin. The classes themselves know nothing of it.
"""
import collections
import contextlib
import difflib
import inspect
import os
import re
import tokenize

import mxnet as mx

import gin
from gn_gluon import checkpoint, data, models, norm, optim, percentiles
from gn_gluon.errors import UserError

RECIPES_INSTALLED = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'recipes')
RECIPES_IN_CLONE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'gin')

#: One statement `key = value` of a gin file or of the command line; `key` is e.g. 'train.norm' or, for a macro, its
#: name; `origin` is 'file:line' or '--gin_bindings'.
#: `macros` are the names of those in its value.
Binding = collections.namedtuple('Binding', ['key', 'line', 'origin', 'included', 'macros'])

_configured = {}
_names = []


def register(cls, name, given=()):
    """Let gin bind the constructor arguments of `cls` as `name.argument`, but for those that its caller gives."""
    given = [argument for argument in given if argument in inspect.signature(cls.__init__).parameters]
    _names.append(name)
    _configured[cls] = gin.external_configurable(cls, name=name, module='gn_gluon', denylist=given)


def configured(cls):
    """The class whose constructor arguments are those that gin has bound for the registered class `cls`."""
    return _configured[cls]


def make(cls):
    """An object of the registered class `cls`, with the arguments that gin has bound."""
    with errors_named():
        return _configured[cls]()


for _room, _given in ((norm, ('in_channels', 'activation', 'gamma_initializer', 'prefix', 'params')),
                      (models, ('norm', 'num_classes', 'prefix', 'params')), (data, ('data_dir',)), (optim, ())):
    for _name in _room.__all__:
        if isinstance(getattr(_room, _name), type):
            register(getattr(_room, _name), _name, _given)
register(checkpoint.Checkpoints, 'checkpoint', ('folder',))
register(percentiles.Percentiles, 'percentiles', ('net',))


def find_file(path, included_from=None):
    """The gin file that `path` names: beside the including file, from the working directory, or among the recipes.

    Raises UserError saying where it was looked for.
    """
    candidates = [path]
    if included_from is not None:
        candidates.insert(0, os.path.join(os.path.dirname(included_from), path))
    if os.path.dirname(path) in ('', 'gin'):
        candidates += [os.path.join(folder, os.path.basename(path)) for folder in (RECIPES_IN_CLONE, RECIPES_INSTALLED)]
    for candidate in candidates:
        if os.path.isfile(candidate):
            return candidate
    raise UserError('gin file {} not found{}; looked for {}'.format(
        path, f', included by {included_from}' if included_from else '', ', '.join(candidates)))


def parse(gin_files, gin_bindings=()):
    """Replace gin's state by these files, then these bindings; later ones win.

    Arguments:
        gin_files: paths; each may include others.
        gin_bindings: statements such as 'train.num_epochs = 3'.
    Returns the list of Bindings, in order. Raises UserError naming the statement, its file and line.
    """
    gin.clear_config()
    bindings = []
    for path in gin_files:
        _parse_file(find_file(path), bindings, (), included=False)
    for text in gin_bindings:
        _parse_text(text, '--gin_bindings', bindings, (), included=False)
    try:
        gin.finalize()
    except ValueError as error:
        raise UserError(one_line(error)) from None
    return bindings


def _parse_file(path, bindings, chain, included):
    if os.path.realpath(path) in map(os.path.realpath, chain):
        raise UserError(f"{path} includes itself: {' -> '.join(chain + (path,))}")
    try:
        with open(path) as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'gin file {path} cannot be read: {error}') from None
    if not text.strip():
        raise UserError(f'gin file {path} is empty')
    _parse_text(text, path, bindings, chain + (path,), included)


def _parse_text(text, origin, bindings, chain, included):
    parser = gin.config_parser.ConfigParser(text, gin.config.ParserDelegate(skip_unknown=False))
    while True:
        try:
            statement = next(parser)
        except StopIteration:
            return
        except (SyntaxError, ValueError, tokenize.TokenError) as error:
            raise _explained(error, text, origin) from None
        where = _where(origin, statement.location.line_num)
        if isinstance(statement, gin.config_parser.IncludeStatement):
            _parse_file(find_file(statement.filename, origin if chain else None), bindings, chain, included=True)
        elif isinstance(statement, gin.config_parser.BindingStatement):
            key = binding_key(statement.scope, statement.selector, statement.arg_name)
            try:
                if statement.arg_name:
                    gin.bind_parameter((statement.scope, statement.selector, statement.arg_name), statement.value)
                else:
                    gin.bind_parameter((key, 'gin.macro', 'value'), statement.value)
            except (ValueError, TypeError) as error:
                raise _explained(error, text, origin, statement.location.line_num) from None
            macros = re.findall(r'%([\w./]+)', repr(statement.value))
            bindings.append(Binding(key, statement.location.line_content.strip(), where, included, macros))
        elif isinstance(statement, gin.config_parser.ImportStatement):
            raise UserError('{}: imports are not supported in gin files; configurables are {}'.format(
                where, ', '.join(norm.__all__ + models.__all__ + data.__all__)))


def _explained(error, text, origin, line=None):
    """What gin has to say of a statement in `text`, as a UserError with its file, line and words."""
    # gin writes 'In bindings string line 3' into the message, or carries the line as a SyntaxError does.
    message, _, place = one_line(error).partition(' In bindings string line ')
    line = line or getattr(error, 'lineno', None) or int(place.split(' ')[0] or 0)
    if isinstance(error, tokenize.TokenError):
        message, line = error.args[0], min(error.args[1][0], len(text.splitlines()))
    message = message.replace(f' (line {line})', '').rstrip('.')
    unknown = re.match(r"No configurable matching.*'@?(.+)'", message)
    if unknown:
        alike = difflib.get_close_matches(unknown.group(1), _names, 1)
        message += f'; did you mean {alike[0]}?' if alike else f'; there are {", ".join(sorted(_names))}'
    elif message == 'Expected newline':
        message = 'a value must be a literal (gin has no arithmetic)'
    return UserError(f'{_where(origin, line or None)}: {message}: `{text.splitlines()[line - 1].strip()}`')


def _where(origin, line_number):
    return origin if origin.startswith('--') or line_number is None else f'{origin}:{line_number}'


def binding_key(scope, selector, arg_name):
    """'scope/Name.argument' with the module of Name left out; a macro's name when there is no argument."""
    prefix = scope + '/' if scope else ''
    return prefix + selector.split('.')[-1] + ('.' + arg_name if arg_name else '')


def operative_config():
    """What was really used, as gin text: arguments bound or defaulted of everything that was built."""
    return gin.operative_config_str(max_line_length=110)


def statements(text):
    """The statements of gin text, as a dict from key to value written in one line."""
    parser = gin.config_parser.ConfigParser(text, gin.config.ParserDelegate(skip_unknown=True))
    return {binding_key(s.scope, s.selector, s.arg_name): ' '.join(repr(s.value).split())
            for s in parser if isinstance(s, gin.config_parser.BindingStatement)}


def unused(bindings):
    """The Bindings that nothing built so far has used.

    A macro is used where a statement names it, even one that a later statement overrides; an argument is used, too,
    where only a scope of its configurable was built (`@stem/GroupNorm`), which inherits it.
    """
    used = set(statements(operative_config()))
    used.update(macro for binding in bindings for macro in binding.macros)
    used.update(key.rsplit('/', 1)[-1] for key in list(used) if '.' in key)
    return [binding for binding in bindings if binding.key not in used]


def refuse_unused(bindings):
    """Raise UserError for the first statement of the top-level files or the command line that the run did not use."""
    for binding in unused(bindings):
        if not binding.included:
            raise UserError(f'{binding.origin}: `{binding.line}` is bound but this run does not use it; remove it or '
                            'correct its name')


@contextlib.contextmanager
def errors_named():
    """What gin's values do to the constructors they are given to becomes a UserError that names the configurable."""
    try:
        yield
    except (TypeError, ValueError, AttributeError, ArithmeticError, mx.MXNetError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip() and 'Stack trace' not in line]
        call = [line for line in lines if line.startswith('In call to configurable')]
        what = next((line for line in lines if 'Check failed' in line), lines[0] if lines else repr(error))
        raise UserError(f"the config does not fit: {what}{' (' + call[0] + ')' if call else ''}") from error


def one_line(error):
    """An exception's message without line breaks."""
    return ' '.join(str(error).split())
