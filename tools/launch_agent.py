"""What tools/launch.py --agent runs on each host: it starts processes there, and never leaves one behind.

Orders come as lines of JSON on stdin: own_address, free_port, start, signal and, every second, ping. Lines of JSON
on stdout tell what became of them: answers, started, the lines of output, exits and, every second, the states. All
that was started is ended with SIGKILL when stdin closes, when no order came for a while, and with the agent itself.
"""
import contextlib
import ctypes
import fcntl
import json
import os
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time

SILENCE = 15  # seconds without a word after which an agent and its launcher give each other up
END = 8  # seconds that an agent has to end what it started
BAD_INPUT = 2


class UserError(Exception):
    """Bad input, in one sentence."""


class Lines:
    """Cuts what comes from a pipe into lines, which keep their ends. One longer than `limit` bytes comes in pieces."""

    def __init__(self, limit=float('inf')):
        self._limit = limit
        self._rest = b''

    def cut(self, data):
        lines = (self._rest + data).splitlines(keepends=True)
        self._rest = b''
        if lines and not lines[-1].endswith((b'\n', b'\r')) and len(lines[-1]) < self._limit:
            self._rest = lines.pop()
        return lines

    def rest(self):
        rest, self._rest = self._rest, b''
        return [rest] if rest else []


def write(descriptor, data):
    while data:
        data = data[os.write(descriptor, data):]


def message(kind, **values):
    return json.dumps(dict(values, kind=kind)).encode() + b'\n'


def stat(pid):
    """(state, parent, session) of a process."""
    with open(f'/proc/{pid}/stat', errors='replace') as file:  # a name may be cut within a letter
        state, parent, _, session = file.read().rpartition(')')[2].split()[:4]
    return state, int(parent), int(session)


def kill_where(condition):
    """SIGKILL for all processes for which `condition(parent, session)` holds."""
    for pid in map(int, filter(str.isdigit, os.listdir('/proc'))):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if condition(*stat(pid)[1:]):
                os.kill(pid, signal.SIGKILL)


def end_session(leader):
    """Ends a process that leads a session and all that it started, in whichever process groups."""
    with contextlib.suppress(OSError):
        os.killpg(leader, signal.SIGKILL)  # at one stroke, also for those that start others meanwhile
    kill_where(lambda _, session: session == leader)


def adopt():
    """Makes orphans among the descendants children of this process."""
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER


def end_children():
    """Ends all children, and then those that become children by that, until there are none."""
    own = os.getpid()
    with contextlib.suppress(ChildProcessError):
        while True:
            kill_where(lambda parent, _: parent == own)
            os.wait()


def end_with(parent, number):
    """Has the kernel send this process a signal when `parent` ends, in whichever way."""
    ctypes.CDLL(None).prctl(1, int(number))  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def own_address(interface, peer):
    """The IPv4 address of an interface (its name or an address), or without one that from which `peer` is reached."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            if interface in [name for _, name in socket.if_nameindex()]:
                request = struct.pack('256s', interface.encode())
                return socket.inet_ntoa(fcntl.ioctl(probe, 0x8915, request)[20:24])  # SIOCGIFADDR
            if interface:
                probe.bind((interface, 0))
            else:
                probe.connect((peer, 9))  # sends nothing
            address = probe.getsockname()[0]
        except OSError as error:
            what = f'no interface or address {interface}' if interface else f'no way to {peer}; name the --interface'
            raise UserError(f'{socket.gethostname()}: {what} ({error})') from None
    if address == '0.0.0.0':
        raise UserError('--interface 0.0.0.0 would be open to every network; name one')
    return address


def free_port(address, port):
    """`port` itself, or any port if it is 0. Raises UserError where it is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as ps-lite: connections of before do not count
        try:
            probe.bind((address, port))
        except OSError as error:
            raise UserError(f'port {port} of {address} cannot be used: {error.strerror}') from None
        return probe.getsockname()[1]


class Child:
    """A process that the agent started, and how far it said it is."""

    def __init__(self, argv, environment):
        agent = os.getpid()
        environment = dict(os.environ, **environment)
        environment.pop('PORT', None)  # ps-lite would bind it, every process the same one
        environment['PYTHONUNBUFFERED'] = '1'  # else a process that is killed takes its last lines with it
        self.process = subprocess.Popen(argv, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, start_new_session=True,
                                        preexec_fn=lambda: end_with(agent, signal.SIGKILL))
        self.pid = self.process.pid
        self.pipes = {'stdout': self.process.stdout, 'stderr': self.process.stderr}
        self.lines = {stream: Lines(limit=1 << 16) for stream in self.pipes}
        self._progress_file = environment.get('GN_GLUON_PROGRESS', '')  # of workers only
        self._changed = self._seen = None
        self._progress = ''

    def ended(self):
        # It stays a zombie until its session is ended, so that its id cannot be another's meanwhile.
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def progress(self):
        """(text, seconds since it was written), or None before the first."""
        with contextlib.suppress(OSError):
            changed = os.stat(self._progress_file).st_mtime_ns
            if changed != self._changed:  # by the monotonic clock: the other one may be set meanwhile
                self._changed, self._seen = changed, time.monotonic()
            with open(self._progress_file, errors='replace') as file:
                self._progress = file.read(200).strip() or self._progress
        return self._seen and (self._progress, time.monotonic() - self._seen)


class Agent:
    """Serves the launcher at the other end of stdin and stdout until that is gone; `folder` is for temporary files."""

    def __init__(self, folder):
        self._folder = folder
        self._children = {}
        self._closed = self._killed = False
        self._orders = Lines()
        self._next_states = 0
        self._selector = selectors.DefaultSelector()

    def run(self):
        endings = (signal.SIGALRM, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
        try:
            for number in endings:
                signal.signal(number, lambda *_: sys.exit(1))  # also out of a write that the launcher does not read
            signal.alarm(SILENCE)
            self._wake_on_exits()
            self._selector.register(0, selectors.EVENT_READ, self._obey)
            self._send('hello', folder=self._folder)
            while not self._closed:
                self._serve()
            self._killed = True
            for child in self._children.values():
                end_session(child.pid)
            deadline = time.monotonic() + END / 2
            while self._children and time.monotonic() < deadline:
                self._reap()
                time.sleep(0.01)
        except BrokenPipeError:
            pass
        finally:
            for number in endings:
                signal.signal(number, signal.SIG_IGN)
            end_children()
            shutil.rmtree(self._folder, ignore_errors=True)

    def _wake_on_exits(self):
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._selector.register(reader, selectors.EVENT_READ, lambda: os.read(reader, 4096))

    def _send(self, kind, **values):
        write(1, message(kind, **values))

    def _serve(self):
        for key, _ in self._selector.select(timeout=max(0, self._next_states - time.monotonic())):
            key.data()
        self._reap()
        if time.monotonic() >= self._next_states:
            self._next_states = time.monotonic() + 1
            self._send('states', states={name: (stat(child.pid)[0], child.progress())
                                         for name, child in self._children.items()})

    def _obey(self):
        data = os.read(0, 1 << 16)
        self._closed = not data
        for line in self._orders.cut(data):
            signal.alarm(SILENCE)
            order = json.loads(line)
            kind = order.pop('kind')
            if kind in ('own_address', 'free_port'):
                self._answer({'own_address': own_address, 'free_port': free_port}[kind], order)
            elif kind == 'start':
                self._start(**order)
            elif kind == 'signal':
                for name in set(order['names']) & set(self._children):
                    os.kill(self._children[name].pid, order['number'])

    def _answer(self, function, arguments):
        try:
            self._send('answer', value=function(**arguments))
        except UserError as error:
            self._send('refusal', text=str(error))

    def _start(self, name, argv, environment):
        try:
            child = Child(argv, environment)
        except OSError as error:
            self._send('line', name=name, stream='stderr', text=f'{error}\n')
            self._send('exit', name=name, code=BAD_INPUT, killed=False)
            return
        self._children[name] = child
        self._send('started', name=name, pid=child.pid)
        for stream, pipe in child.pipes.items():
            os.set_blocking(pipe.fileno(), False)
            self._selector.register(pipe, selectors.EVENT_READ,
                                    lambda stream=stream: self._relay(name, child, stream))

    def _relay(self, name, child, stream):
        """Passes on 64 KiB of what a pipe holds; False if it holds nothing now."""
        try:
            data = os.read(child.pipes[stream].fileno(), 1 << 16)
        except BlockingIOError:
            return False
        self._send_lines(name, stream, child.lines[stream].cut(data))
        if not data:
            self._unregister(child.pipes[stream])
        return bool(data)

    def _send_lines(self, name, stream, lines):
        for line in lines:
            self._send('line', name=name, stream=stream, text=line.decode(errors='surrogateescape'))

    def _unregister(self, pipe):
        with contextlib.suppress(KeyError):  # at the end of the file it was already
            self._selector.unregister(pipe)

    def _reap(self):
        for name, child in list(self._children.items()):
            if child.ended():
                end_session(child.pid)
                code = child.process.wait()
                for stream, pipe in child.pipes.items():
                    while self._relay(name, child, stream):
                        pass
                    self._send_lines(name, stream, child.lines[stream].rest())
                    self._unregister(pipe)
                    pipe.close()
                del self._children[name]
                self._send('exit', name=name, code=code, killed=self._killed)


def serve():
    """Runs an agent as a child of a guard, this process. When one of them is killed the other ends what is left."""
    guard = os.getpid()
    folder = tempfile.mkdtemp(prefix='gn_gluon_launch_')
    adopt()
    agent = os.fork()
    if agent == 0:
        adopt()
        end_with(guard, signal.SIGTERM)
        Agent(folder).run()
        return
    while os.wait()[0] != agent:
        pass
    end_children()
    shutil.rmtree(folder, ignore_errors=True)
