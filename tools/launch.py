#!/usr/bin/env python
"""Starts a training over several processes or machines, and ends all of them as soon as one fails.

    python tools/launch.py --local 2 -- python -m gn_gluon.train --gin_file FILE
    python tools/launch.py --hosts hosts.txt --restarts 3 -- python -m gn_gluon.train --gin_file FILE
    mpirun -n 4 python tools/launch.py -- python -m gn_gluon.train --gin_file FILE

The same command is started for each role of MXNet's parameter server: a scheduler, servers, and workers. A line of the
file of hosts is `HOST [WORKERS]`; every host has this folder and this Python at the same place. Under mpirun or srun
nothing is started: the rank of this process says its role, and the command takes its place.

On each host an agent (launch_agent.py) starts the processes and talks to the launcher over its stdin and stdout, for
other hosts through ssh. It ends all that it started when the launcher is gone, silent, or closes the pipe; that is also
how the launcher ends everything.

Exit codes: 0; 2 bad input; 4 a process hung or a host was lost; 130 or 143 after Ctrl-C or SIGTERM; else that of the
process that failed, or 128 + its signal.
"""
import argparse
import collections
import contextlib
import json
import os
import queue
import re
import selectors
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

from launch_agent import (
    BAD_INPUT,
    END,
    SILENCE,
    Lines,
    UserError,
    end_session,
    free_port,
    message,
    own_address,
    serve,
    write,
)

START = 60  # seconds that an agent has for its first word: ssh may wait for a slow name server
LEAVE = 10  # seconds that scheduler and servers have to leave once the workers have, and that the workers have then
STOPPED = 10  # seconds in state T after which a process counts as hung
LAST_LINES = 20
SSH = 'ssh -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=5 -o ServerAliveCountMax=3'
CARRIED = ('DMLC_', 'GN_GLUON_', 'MXNET_', 'OMP_', 'PS_')  # variables that are the same on every host
NAN_LOSS, HUNG = 3, 4  # exit codes; after BAD_INPUT and NAN_LOSS a restart would fail again


class JobError(Exception):
    """Why a job ended, and the exit code. A process failed, or a host was lost, or all of them hang."""

    def __init__(self, code, text, process=None, host=None):
        super().__init__(text)
        self.code, self.process, self.host = code, process, host


class Interrupted(Exception):  # noqa: N818 - not an error: the user asked for it
    """The launcher had a signal."""


class Process:
    """What the launcher knows of a process of the job."""

    def __init__(self, role, number, host):
        self.role = role
        self.name = role if role == 'scheduler' else f'{role} {number}'
        self.host = host
        self.pid = self.code = self.ended_at = self.stopped_at = self.age = None
        self.killed = False  # by its agent, when all were ended
        self.state, self.progress = '?', ''
        self.last_lines = collections.deque(maxlen=LAST_LINES)

    def update(self, state, progress):
        self.state = state
        self.stopped_at = (self.stopped_at or time.monotonic()) if state == 'T' else None
        if progress:
            self.progress, self.age = progress

    def __str__(self):
        return f'{self.name} ({self.host.name}, pid {self.pid})'

    def how(self):
        if self.code >= 0:
            return f'ended with exit code {self.code}'
        name = {number.value: number.name for number in signal.Signals}.get(-self.code, f'signal {-self.code}')
        return f'was killed by {name}' + (' (for want of memory?)' if name == 'SIGKILL' else '')

    def standing(self):
        """What sorts workers by how far they are: the numbers of "epoch 3, update 17", then the time since."""
        return [int(digits) for digits in re.findall(r'\d+', self.progress)], -(self.age or float('inf'))

    def whereabouts(self):
        if self.code is not None:
            return f'{self.name} {self.how()}'
        step = '' if self.age is None else f' since {self.progress!r} {self.age:.0f} s ago'
        return f'{self.name} in state {self.state}{step}'


class Host:
    """The launcher's end of the agent of one host, whose `workers` are a number."""

    def __init__(self, name, workers, ssh):
        self.name, self.workers, self.local = name, workers, ssh is None
        agent = [sys.executable, os.path.abspath(__file__), '--agent']
        if ssh is not None:
            agent = [*ssh, name, f'cd {shlex.quote(os.getcwd())} && exec ' + ' '.join(map(shlex.quote, agent))]
        try:
            self.agent = subprocess.Popen(agent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                          bufsize=0, start_new_session=True)  # Ctrl-C is for the launcher alone
        except OSError as error:
            raise UserError(f'{agent[0]} cannot be started: {error.strerror}') from None
        self.pipes = {'stdout': self.agent.stdout, 'stderr': self.agent.stderr}
        self.lines = {stream: Lines() for stream in self.pipes}
        self.heard = time.monotonic()
        self.folder = None  # for the files of progress; known once the agent has said its first word
        self.lost = False
        self.answer = None
        self.last_line = ''

    def send(self, kind, **values):
        with contextlib.suppress(OSError):  # if the agent has gone, the end of its stdout says so
            write(self.agent.stdin.fileno(), message(kind, **values))


class Printer:
    """Writes to stdout and stderr in a thread: a terminal that is stopped must not stop the pings to the agents."""

    def __init__(self):
        self._queue = queue.Queue(maxsize=100000)  # lines: a bound on the memory
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        for descriptor, data in iter(self._queue.get, None):
            with contextlib.suppress(OSError):  # whoever read it has gone
                write(descriptor, data)

    def write(self, text, descriptor=2):
        self._queue.put((descriptor, text.encode(errors='surrogateescape')))

    def close(self):
        self._queue.put(None)
        self._thread.join()


class Job:
    """One start of all processes on `hosts`, a dict of names and their numbers of workers.

    `number` counts the starts from 1, `signals` is the list of those that the launcher has had so far.
    """

    def __init__(self, number, flags, hosts, command, printer, signals):
        self._number, self._flags, self._command, self._printer = number, flags, command, printer
        self._workers, self._signals = hosts, signals
        self._hosts, self._processes, self._ended = [], {}, []
        self._stopping = False
        self._next_ping = 0
        self._selector = selectors.DefaultSelector()

    def run(self):
        """Returns None once all workers have ended well, else the JobError. All processes are gone then."""
        try:
            self._start()
            while not self._workers_done():
                self._step()
                self._judge()
            with contextlib.suppress(JobError, Interrupted):
                self._wait(lambda: not self._running(), LEAVE)
            return None
        except JobError as error:
            return error
        except UserError as error:
            return JobError(BAD_INPUT, str(error))
        except Interrupted:
            return self._stop()
        finally:
            self._end()

    def describe(self, error):
        """The whole story of an error, with what else failed and the last lines; complete after `run` only."""
        story = str(error)
        others = [process for process in self._ended if process.code and not process.killed]
        if not self._signals:
            story += ''.join(f'; {process} {process.how()} too' for process in others if process is not error.process)
        if error.process and error.process.last_lines:
            story += '; its last lines:\n' + '\n'.join('  ' + line for line in error.process.last_lines)
        return story

    def _start(self):
        flags = self._flags
        for name, workers in self._workers.items():
            host = Host(name, workers, None if flags.local else flags.ssh)
            self._hosts.append(host)
            for stream, pipe in host.pipes.items():
                self._selector.register(pipe, selectors.EVENT_READ, (host, stream))
        self._wait(lambda: all(host.folder for host in self._hosts))
        first, peers = self._hosts[0], [host.name.rpartition('@')[2] for host in self._hosts[1:]]
        root = '127.0.0.1'
        if not flags.local:
            root = self._ask(first, 'own_address', interface=flags.interface, peer=(peers or [root])[0])
        port = self._ask(first, 'free_port', address=root, port=flags.port or 0)
        addresses = {}
        for host in self._hosts:
            addresses[host] = root if host is first else self._ask(
                host, 'own_address', interface=flags.interface, peer=root)
        self._start_processes(root, port, addresses)

    def _start_processes(self, root, port, addresses):
        hosts = self._hosts
        servers = self._flags.servers or len(hosts)
        workers = [(host, index) for host in hosts for index in range(host.workers)]
        roles = [('scheduler', 0, hosts[0], {})]
        roles += [('server', number, hosts[number % len(hosts)], {}) for number in range(servers)]
        roles += [('worker', number, host, dict(worker_environment(number, host.workers, index),
                                                GN_GLUON_PROGRESS=f'{host.folder}/worker{number}'))
                  for number, (host, index) in enumerate(workers)]
        carried = {name: value for name, value in os.environ.items() if name.startswith(CARRIED)}
        for role, number, host, extra in roles:
            process = Process(role, number, host)
            self._processes[process.name] = process
            host.send('start', name=process.name, argv=self._command, environment=dict(
                carried, **role_environment(role, root, port, len(workers), servers, addresses[host]), **extra))

    def _ask(self, host, question, **arguments):
        host.answer = None
        host.send(question, **arguments)
        self._wait(lambda: host.answer)
        if host.answer['kind'] == 'refusal':
            raise UserError(host.answer['text'])
        return host.answer['value']

    def _wait(self, condition, seconds=float('inf')):
        deadline = time.monotonic() + seconds
        while not condition() and time.monotonic() < deadline:
            self._step()

    def _running(self, role=''):
        return [process for process in self._processes.values() if process.code is None and role in process.role]

    def _workers_done(self):
        return all(process.code == 0 for process in self._processes.values() if process.role == 'worker')

    def _step(self):
        """Waits a moment for what the agents say. Raises JobError for a lost host, Interrupted after a signal."""
        now = time.monotonic()
        if now >= self._next_ping:
            self._next_ping = now + 1
            for host in self._hosts:
                host.send('ping')
        self._listen(0.2)
        for host in self._hosts:
            patience = SILENCE if host.folder else START
            if time.monotonic() - host.heard > patience:
                raise self._lost(host, f'said nothing for {patience} s')
            if host.agent.stdout.closed:
                raise self._lost(host, 'ended')
        if self._signals and not self._stopping:
            raise Interrupted

    def _lost(self, host, how):
        host.lost = True
        last_line = f': {host.last_line}' if host.last_line else ''
        if host.folder or self._number > 1:
            return JobError(HUNG, f'host {host.name} is lost, its agent {how}{last_line}', host=host)
        return JobError(BAD_INPUT, f'host {host.name} cannot be reached, its agent {how}{last_line}', host=host)

    def _listen(self, seconds):
        for key, _ in self._selector.select(timeout=seconds):
            host, stream = key.data
            data = os.read(key.fd, 1 << 16)
            host.heard = time.monotonic()
            for line in host.lines[stream].cut(data) if data else host.lines[stream].rest():
                self._receive(host, stream, line)
            if not data:
                self._selector.unregister(key.fileobj)
                key.fileobj.close()

    def _receive(self, host, stream, line):
        try:
            word = json.loads(line) if stream == 'stdout' else None
        except ValueError:
            word = None
        if not isinstance(word, dict):  # of ssh, or of a login shell that greets
            host.last_line = line.decode(errors='replace').strip() or host.last_line
            if host.folder:
                self._printer.write(f'host {host.name}: {host.last_line}\n')
            return
        kind, process = word.get('kind'), self._processes.get(word.get('name'))
        if kind == 'hello':
            host.folder = word['folder']
        elif kind in ('answer', 'refusal'):
            host.answer = word
        elif kind == 'started':
            process.pid = word['pid']
        elif kind == 'line':
            self._print(process, word['stream'], word['text'])
        elif kind == 'exit':
            process.code, process.killed, process.ended_at = word['code'], word['killed'], time.monotonic()
            self._ended.append(process)
        elif kind == 'states':
            for name, (state, progress) in word['states'].items():
                self._processes[name].update(state, progress)

    def _print(self, process, stream, text):
        line = text.rstrip('\r\n')
        process.last_lines.append(line)
        if process.name == 'worker 0':
            self._printer.write(text, 1 if stream == 'stdout' else 2)
        else:
            self._printer.write(f'{process.name}: {line}\n')

    def _judge(self):
        """Raises JobError if the job cannot end well any more."""
        now = time.monotonic()
        for process in self._ended:
            if process.code:
                code = process.code if process.code > 0 else 128 - process.code
                raise JobError(code, f'{process} {process.how()}', process)
        for process in self._ended:
            # At a good end too a worker may be the last to leave.
            if process.role != 'worker' and now - process.ended_at > LEAVE:
                raise JobError(1, f'{process} {process.how()} before the workers', process)
        for process in self._running():
            if process.stopped_at and now - process.stopped_at > STOPPED:
                raise JobError(HUNG, f'{process} is stopped (state T) for {STOPPED} s', process)
        workers = [worker for worker in self._running('worker') if worker.age is not None]  # the others do not tell
        if workers and min(worker.age for worker in workers) > self._flags.timeout:
            last = min(self._running('worker'), key=Process.standing)
            states = ', '.join(process.whereabouts() for process in self._processes.values())
            raise JobError(HUNG, f'no worker made a step for {self._flags.timeout:g} s; farthest behind is {last}; '
                           f'{states}', last)

    def _stop(self):
        """After a signal: SIGTERM for the workers, and time to save, unless there is a second signal."""
        self._stopping = True
        code = 128 + self._signals[0]
        names = [worker.name for worker in self._running('worker')]
        for host in self._hosts:
            host.send('signal', names=names, number=int(signal.SIGTERM))
        saved = (0, 128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGTERM)

        def failed():
            return [worker for worker in self._ended if worker.role == 'worker' and worker.code not in saved]

        def in_vain():
            # A worker that ends by SIGTERM itself has not begun: the others wait for it, and have nothing to save.
            return len(self._signals) > 1 or failed() or any(
                worker.code == -signal.SIGTERM for worker in self._ended if worker.role == 'worker')

        try:
            self._wait(lambda: not self._running('worker') or in_vain(), self._flags.grace)
        except JobError as error:
            return JobError(code, f'interrupted, and then {error}')
        if failed():
            return JobError(code, f'interrupted, and then {failed()[0]} {failed()[0].how()}', failed()[0])
        late = [worker.name for worker in self._running('worker')]
        return JobError(code, 'interrupted' + (f', killed before the end: {", ".join(late)}' if late else ''))

    def _end(self):
        """Ends all processes everywhere, and returns when they are gone."""
        for host in self._hosts:
            host.agent.stdin.close()
            if host.lost:
                self._kill(host)
        deadline = time.monotonic() + END
        while not all(host.agent.stdout.closed for host in self._hosts) and time.monotonic() < deadline:
            self._listen(0.1)
        for host in self._hosts:
            with contextlib.suppress(subprocess.TimeoutExpired):
                host.agent.wait(timeout=1 if host.agent.stdout.closed else 0)
            self._kill(host)
            host.agent.wait()

    def _kill(self, host):
        """For an agent that does not answer: ends it, or the ssh to it, and on this machine also its processes."""
        if host.agent.returncode is None:
            end_session(host.agent.pid)
        for process in self._processes.values():
            if host.local and process.pid and process.code is None:
                end_session(process.pid)


def role_environment(role, root, port, workers, servers, address):
    """What ps-lite reads."""
    return {'DMLC_ROLE': role, 'DMLC_PS_ROOT_URI': root, 'DMLC_PS_ROOT_PORT': str(port), 'DMLC_NODE_HOST': address,
            'DMLC_NUM_WORKER': str(workers), 'DMLC_NUM_SERVER': str(servers)}


def worker_environment(number, here, index):
    return {'GN_GLUON_WORKER': str(number), 'GN_GLUON_WORKERS_HERE': str(here), 'GN_GLUON_WORKER_HERE': str(index)}


def launch(flags, hosts, command):
    """Starts the job, again after a failure as often as --restarts says. Returns the exit code."""
    signals, printer = [], Printer()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: signals.append(number))
    for start in range(1, flags.restarts + 2):
        if start > 1:
            printer.write(f'launch: start {start} of 1 + {flags.restarts}, with {sum(hosts.values())} workers '
                          f'on {", ".join(hosts)}\n')
        job = Job(start, flags, hosts, command, printer, signals)
        error = job.run()
        if error is None:
            break
        printer.write(f'{"launch" if signals else "error"}: {job.describe(error)}\n')
        if signals or error.code in (BAD_INPUT, NAN_LOSS):
            break
        if error.host:
            if error.host.name == next(iter(hosts)):
                printer.write('launch: no restart without the first host, which has the run folder; if it is on a file '
                              'system that all hosts share, name another host first, and the same command goes on\n')
                break
            hosts = {name: workers for name, workers in hosts.items() if name != error.host.name}
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # while a stopped terminal keeps the last lines waiting
    printer.close()
    return error.code if error else 0


# ---- under mpirun or srun: the rank says the role

RANKS = (('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE'), ('PMI_RANK', 'PMI_SIZE'), ('SLURM_PROCID', 'SLURM_NTASKS'))


def own_rank():
    """(rank, ranks in all) as mpirun or srun say, else None."""
    for rank, size in RANKS:
        if rank in os.environ and size in os.environ:
            return int(os.environ[rank]), int(os.environ[size])
    return None


def take_role(flags, rank, size, command):
    """Becomes the command: of rank 0 the scheduler, then the servers, then the workers."""
    servers = flags.servers or 1
    workers = size - 1 - servers
    if workers < 1:
        raise UserError(f'{size} ranks are too few for 1 scheduler, {servers} servers and a worker; '
                        f'start {2 + servers} or more')
    here = str(size) == os.environ.get('OMPI_COMM_WORLD_LOCAL_SIZE') or os.environ.get('SLURM_NNODES') == '1'
    if not (flags.root or here):
        raise UserError('the ranks are on several hosts, or may be: name the address of the host of rank 0 with --root '
                        'ADDRESS')
    try:
        root = socket.gethostbyname(flags.root or '127.0.0.1')
    except OSError as error:
        raise UserError(f'--root {flags.root}: {error.strerror}') from None
    role = 'scheduler' if rank == 0 else 'server' if rank <= servers else 'worker'
    port = flags.port or 9091
    if rank == 0:
        free_port(root, port)
    address = own_address(flags.interface, root)
    os.environ.update(role_environment(role, root, port, workers, servers, address))
    if role == 'worker':
        number = rank - 1 - servers
        os.environ.update(worker_environment(number, workers, number) if here else {'GN_GLUON_WORKER': str(number)})
    os.environ.pop('PORT', None)
    os.execv(command[0], command)


# ---- the command line

class Parser(argparse.ArgumentParser):
    def error(self, text):
        raise UserError(text)


def number_from(least, kind=int, most=float('inf')):
    def read(text):
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f'{text} is not from {least} to {most}' if most < float('inf') else
                                             f'{text} is less than {least}')
        return value
    read.__name__ = 'number'
    return read


def build_parser():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                    usage='%(prog)s (--local N | --hosts FILE) [options] -- COMMAND...')
    parser.add_argument('--local', type=number_from(1), metavar='N', help='so many workers on this machine')
    parser.add_argument('--hosts', metavar='FILE', help='one host per line: a name for ssh and, if not 1, how many '
                        'workers; # begins a comment. The scheduler runs on the first')
    parser.add_argument('--servers', type=number_from(1), metavar='M', help='default: one per host')
    parser.add_argument('--restarts', type=number_from(0), default=0, metavar='K',
                        help='start again up to K times after a failure, without the hosts that were lost (default: 0)')
    parser.add_argument('--timeout', type=number_from(0, float), default=600, metavar='SECONDS',
                        help='without a step of any worker, after which they count as hung (default: 600)')
    parser.add_argument('--grace', type=number_from(0, float), default=60, metavar='SECONDS',
                        help='that workers have to save after Ctrl-C or SIGTERM (default: 60)')
    parser.add_argument('--port', type=number_from(1, most=65535), metavar='P',
                        help='of the scheduler (default: a free one; under mpirun or srun 9091)')
    parser.add_argument('--interface', metavar='NAME_OR_ADDRESS',
                        help='what the processes of a host bind (default: what leads to the other hosts)')
    parser.add_argument('--ssh', type=shlex.split, default=shlex.split(SSH), metavar='WORDS',
                        help=f'before the name of a host (default: {SSH})')
    parser.add_argument('--root', metavar='ADDRESS', help='under mpirun or srun: the host of rank 0')
    return parser


def parse(argv):
    """(flags, command with its whole path) of the command line."""
    parser = build_parser()
    end = argv.index('--') if '--' in argv else len(argv)
    flags = parser.parse_args(argv[:end])
    if flags.local and flags.hosts:
        raise UserError('--local and --hosts exclude each other')
    if not (flags.local or flags.hosts or own_rank()):
        raise UserError('neither --local N nor --hosts FILE is given, and no mpirun or srun started this')
    mode, others = (('--local', 'interface ssh root') if flags.local else ('--hosts', 'root') if flags.hosts else
                    ('mpirun or srun', 'restarts timeout grace ssh'))
    for name in others.split():
        if getattr(flags, name) != parser.get_default(name):
            raise UserError(f'--{name} means nothing with {mode}')
    command = argv[end + 1:]
    if not command:
        raise UserError('no command: end the line with -- COMMAND...')
    path = shutil.which(command[0])
    if path is None:
        raise UserError(f'command not found: {command[0]}')
    return flags, [os.path.abspath(path), *command[1:]]


def read_hosts(path):
    """The names of the hosts in a file with their numbers of workers, in its order."""
    try:
        with open(path) as file:
            lines = [line.partition('#')[0].split() for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'{path} cannot be read: {getattr(error, "strerror", "not a text")}') from None
    hosts = {}
    for number, words in enumerate(lines, 1):
        if not words:
            continue
        name, workers = words if len(words) == 2 else (words[0], '1')
        if len(words) > 2 or name.startswith('-') or not re.fullmatch('[1-9][0-9]*', workers):
            raise UserError(f'{path}, line {number}: {" ".join(words)!r} is not HOST or HOST WORKERS')
        hosts[name] = hosts.get(name, 0) + int(workers)
    if not hosts:
        raise UserError(f'{path} names no host')
    return hosts


def main(argv):
    if argv == ['--agent']:
        serve()
        return 0
    try:
        flags, command = parse(argv)
        if not (flags.local or flags.hosts):
            take_role(flags, *own_rank(), command)
        return launch(flags, read_hosts(flags.hosts) if flags.hosts else {'localhost': flags.local}, command)
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        return BAD_INPUT


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
