"""The launcher: every role is started as ps-lite wants it, and whatever dies, hangs or is lost, nothing is left."""
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid

import pytest

LAUNCH = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'tools', 'launch.py')

# What every role runs. Scheduler and servers wait for the end as ps-lite does: the number of workers that are through.
ROLE = """
import json, os, signal, subprocess, sys, time
role = os.environ['DMLC_ROLE']
me = role + os.environ.get('GN_GLUON_WORKER', '') if role == 'worker' else role

def hang():
    while True:
        time.sleep(60)

def progress(text):
    with open(os.environ['GN_GLUON_PROGRESS'], 'w') as file:
        file.write(text)

def wait_for(path):
    while not os.path.exists(path):
        time.sleep(0.02)

"""
LEAVE = """
if role == 'worker':
    open('through' + me, 'w').close()
else:
    for number in range(int(os.environ['DMLC_NUM_WORKER'])):
        wait_for('throughworker%d' % number)
"""


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return condition()


class Launch:
    """A launcher that runs `body` in every role, in the folder `path`; its output goes to files there."""

    def __init__(self, path, body, *flags, before=(), leave=True, **environment):
        self.path, self.word = path, uuid.uuid4().hex
        (path / 'role.py').write_text(ROLE + body + (LEAVE if leave else ''))
        self.streams = [open(path / name, 'wb') for name in ('stdout', 'stderr')]
        self.process = subprocess.Popen(
            [*before, sys.executable, LAUNCH, *map(str, flags), '--', sys.executable, 'role.py'], cwd=path,
            stdout=self.streams[0], stderr=self.streams[1], start_new_session=True,
            env=dict(os.environ, LAUNCH_TEST=self.word, **environment))

    def output(self):
        return (self.path / 'stdout').read_bytes().decode(errors='replace')

    def errors(self):
        return (self.path / 'stderr').read_bytes().decode(errors='replace')

    def end(self, code):
        assert self.process.wait(timeout=120) == code, self.errors()
        assert 'launch.py' not in self.errors() and 'launch_agent.py' not in self.errors()  # no traceback of ours
        return self.errors()

    def environments(self):
        """Of all processes that come from this launcher, by process id."""
        found = {}
        for pid in filter(str.isdigit, os.listdir('/proc')):
            try:
                with open(f'/proc/{pid}/environ', 'rb') as file:
                    variables = file.read().decode(errors='replace').split('\0')
            except OSError:
                continue
            if 'LAUNCH_TEST=' + self.word in variables:
                found[int(pid)] = dict(variable.split('=', 1) for variable in variables if '=' in variable)
        return found

    def pids(self, *names):
        """Of processes that ran `HANG`, once all are that far."""
        until(lambda: all((self.path / name).exists() for name in names))
        return [int((self.path / name).read_text()) for name in names]

    def agents(self):
        found = []
        for pid in self.environments():
            with open(f'/proc/{pid}/cmdline') as file:
                found += [pid] * file.read().endswith('launch.py\0--agent\0')
        return sorted(found)


@pytest.fixture
def launch(tmp_path):
    """Starts launchers. In the end no process of theirs may be left."""
    jobs = []

    def start(*arguments, **options):
        jobs.append(Launch(tmp_path, *arguments, **options))
        return jobs[-1]

    yield start
    for job in jobs:
        try:
            until(lambda job=job: not job.environments())
        finally:
            for pid in job.environments():
                os.kill(pid, signal.SIGKILL)
            for stream in job.streams:
                stream.close()
            job.process.wait(timeout=60)


@pytest.fixture
def hosts(tmp_path):
    """Flags for two hosts, of two workers and of one, that are both this machine."""
    (tmp_path / 'ssh').write_text('#!/bin/sh\nshift\nexec sh -c "$1"\n')
    (tmp_path / 'ssh').chmod(0o755)
    (tmp_path / 'hosts').write_text('# a comment\nlocalhost 2\n\n127.0.0.2  # the other one\n')
    return '--hosts', 'hosts', '--ssh', './ssh'


TELL = """
open('told' + me + str(os.getpid()), 'w').write(json.dumps(dict(os.environ)))
"""


def told(path, role):
    return sorted((json.loads(file.read_text()) for file in path.glob(f'told{role}*')),
                  key=lambda names: names.get('GN_GLUON_WORKER', ''))


def check_roles(path, workers, servers, address='127.0.0.1'):
    (scheduler,) = told(path, 'scheduler')
    everyone = [scheduler, *told(path, 'server'), *told(path, 'worker')]
    assert len(told(path, 'server')) == servers and len(told(path, 'worker')) == workers
    for names in everyone:
        assert names['DMLC_NUM_WORKER'] == str(workers) and names['DMLC_NUM_SERVER'] == str(servers)
        assert names['DMLC_PS_ROOT_URI'] == names['DMLC_NODE_HOST'] == address
        assert names['DMLC_PS_ROOT_PORT'] == scheduler['DMLC_PS_ROOT_PORT']
        assert 'PORT' not in names
    assert [names['GN_GLUON_WORKER'] for names in told(path, 'worker')] == [str(i) for i in range(workers)]


def here(path):
    return [(names['GN_GLUON_WORKERS_HERE'], names['GN_GLUON_WORKER_HERE']) for names in told(path, 'worker')]


def test_each_role_has_the_environment_that_ps_lite_needs(launch, tmp_path):
    launch(TELL, '--local', 2, PORT='1234').end(0)
    check_roles(tmp_path, workers=2, servers=1)
    assert here(tmp_path) == [('2', '0'), ('2', '1')]
    assert len({names['GN_GLUON_PROGRESS'] for names in told(tmp_path, 'worker')}) == 2


def test_workers_are_numbered_over_the_hosts_in_the_order_of_the_file(launch, hosts, tmp_path):
    launch(TELL, *hosts, PORT='1234').end(0)
    check_roles(tmp_path, workers=3, servers=2)
    assert here(tmp_path) == [('2', '0'), ('2', '1'), ('1', '0')]


def test_processes_bind_the_interface_that_is_named(launch, hosts, tmp_path):
    launch(TELL, *hosts, '--interface', 'lo', '--servers', 1).end(0)
    check_roles(tmp_path, workers=3, servers=1)


def test_worker_0_speaks_unchanged_and_the_others_with_their_names(launch):
    body = """
if me == 'worker0':
    os.write(1, b'out \\xff\\r\\n\\n'), os.write(2, b'aside\\n')
    os.write(1, b'no end of line')
elif me != 'scheduler':
    os.write(1, b'out\\n'), os.write(2, b'no end of line')
"""
    job = launch(body, '--local', 2)
    errors = job.end(0)
    assert (job.path / 'stdout').read_bytes() == b'out \xff\r\n\nno end of line'
    assert sorted(errors.splitlines()) == ['aside', 'server 0: no end of line', 'server 0: out',
                                           'worker 1: no end of line', 'worker 1: out']


def test_no_line_is_lost_when_a_process_writes_much_and_ends(launch):
    body = """
if role == 'worker':
    for number in range(30000):
        os.write(1, b'line %d of the output\\n' % number)
"""
    job = launch(body, '--local', 2)
    errors = job.end(0)
    lines = [f'line {number} of the output' for number in range(30000)]
    assert job.output().splitlines() == lines
    assert errors.splitlines() == ['worker 1: ' + line for line in lines]


def test_a_worker_that_fails_ends_the_job_with_its_exit_code_and_last_lines(launch):
    body = """
if me == 'worker1':
    for number in range(50):
        print('line', number)
    sys.exit(7)
hang()
"""
    errors = launch(body, '--local', 2).end(7)
    message = errors[errors.index('error: '):]
    assert message.startswith('error: worker 1 (localhost, pid ') and 'ended with exit code 7' in message
    assert message.splitlines()[1:] == [f'  line {number}' for number in range(30, 50)]


GRANDCHILDREN = """
for options in {}, {'preexec_fn': os.setpgrp}, {'start_new_session': True}:
    subprocess.Popen(['sleep', '1000'], **options)
"""


@pytest.mark.parametrize('code', [0, 1])
def test_what_a_process_has_started_ends_with_it(launch, code):
    launch(GRANDCHILDREN + f"""
if me == 'worker1' and {code}:
    sys.exit({code})
""", '--local', 2).end(code)


def test_a_process_whose_name_is_no_text_does_not_outlive_the_others(launch):
    launch("""
import ctypes
ctypes.CDLL(None).prctl(15, b'caf\\xc3')  # PR_SET_NAME
if me == 'worker1':
    subprocess.Popen(['sleep', '1000'], start_new_session=True)
    sys.exit(7)
""" + 'hang()', '--local', 2).end(7)


HANG = """
with open('starting' + me, 'w') as file:
    file.write(str(os.getpid()))
os.rename('starting' + me, me)
hang()
"""
ROLES = ['scheduler', 'server', 'worker0', 'worker1']


@pytest.mark.parametrize('role', ['scheduler', 'server', 'worker1'])
def test_kill_of_any_role_ends_all_and_is_named(launch, role):
    job = launch(HANG, '--local', 2)
    job.pids(*ROLES)
    (pid,) = job.pids(role)
    os.kill(pid, signal.SIGKILL)
    errors = job.end(137)
    name = {'scheduler': 'scheduler', 'server': 'server 0', 'worker1': 'worker 1'}[role]
    assert errors == f'error: {name} (localhost, pid {pid}) was killed by SIGKILL (for want of memory?)\n'


@pytest.mark.parametrize('also_agent', [False, True])
def test_kill_of_the_launcher_leaves_nothing(launch, also_agent):
    job = launch(HANG if also_agent else GRANDCHILDREN + HANG, '--local', 2)
    job.pids(*ROLES)
    for pid in [job.process.pid] + job.agents() * also_agent:
        os.kill(pid, signal.SIGKILL)
    job.process.wait()


@pytest.mark.parametrize('guard', [False, True])
def test_kill_of_the_only_agent_leaves_nothing_and_ends_the_launcher(launch, guard):
    """The agent has a guard: its parent."""
    job = launch(GRANDCHILDREN + HANG, '--local', 2, '--restarts', 3)
    agent = parent(job.pids(*ROLES)[0])
    os.kill(parent(agent) if guard else agent, signal.SIGKILL)
    errors = job.end(4)
    assert 'error: host localhost is lost' in errors and 'start 2' not in errors


SAVE = """
def save(*_):
    open('saved' + me, 'w').close()
    sys.exit(143)
if role == 'worker':
    signal.signal(signal.SIGTERM, save)
""" + HANG


@pytest.mark.parametrize(('number', 'code'), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_workers_save_first(launch, number, code):
    job = launch(SAVE, '--local', 2, '--restarts', 3)
    job.pids(*ROLES)
    os.killpg(job.process.pid, number)  # all of the terminal's foreground, as Ctrl-C
    assert job.end(code) == 'launch: interrupted\n'
    assert (job.path / 'savedworker0').exists() and (job.path / 'savedworker1').exists()


DEAF = """
def hear(*_):
    open('heard' + me, 'w').close()
signal.signal(signal.SIGTERM, hear)
""" + HANG


def test_a_second_signal_waits_for_nobody(launch):
    job = launch(DEAF, '--local', 2, '--grace', 10000)
    job.pids(*ROLES)
    job.process.send_signal(signal.SIGINT)
    until(lambda: (job.path / 'heardworker0').exists() and (job.path / 'heardworker1').exists())
    job.process.send_signal(signal.SIGTERM)
    assert 'killed before the end: worker 0, worker 1' in job.end(130)
    assert not (job.path / 'heardserver').exists()


def test_workers_that_do_not_save_in_time_are_killed(launch):
    job = launch(DEAF, '--local', 2, '--grace', 0.5)
    job.pids(*ROLES)
    job.process.terminate()
    assert 'killed before the end: worker 0, worker 1' in job.end(143)


@pytest.mark.parametrize('pause', [0, 0.05, 0.1, 0.15, 0.2, 0.3])
def test_a_signal_during_the_start_leaves_nothing(launch, pause):
    job = launch(HANG, '--local', 2, '--restarts', 3)
    until(lambda: job.agents() or job.process.poll() is not None)
    time.sleep(pause)
    job.process.terminate()
    job.end(143)


def test_a_process_that_is_stopped_is_named(launch):
    job = launch(HANG, '--local', 2)
    job.pids(*ROLES)
    (pid,) = job.pids('worker1')
    os.kill(pid, signal.SIGSTOP)
    assert job.end(4) == f'error: worker 1 (localhost, pid {pid}) is stopped (state T) for 10 s\n'


def test_workers_without_progress_are_ended_and_the_last_of_them_is_named(launch):
    body = """
if role == 'worker':
    progress('epoch 2, update ' + ('10' if me == 'worker0' else '9'))
    print('at work')
hang()
"""
    job = launch(body, '--local', 2, '--timeout', 2)
    errors = job.end(4)
    message = errors[errors.index('error: '):]
    assert message.startswith('error: no worker made a step for 2 s; farthest behind is worker 1 (localhost, pid ')
    assert "worker 0 in state S since 'epoch 2, update 10'" in message and 'server 0 in state S' in message
    assert message.endswith('its last lines:\n  at work\n')


def test_workers_that_make_or_never_tell_progress_are_left_alone(launch):
    body = """
for number in range(16 if role == 'worker' else 0):
    time.sleep(0.25)
    if me == 'worker0':
        progress('update %d' % number)
"""
    launch(body, '--local', 2, '--timeout', 2).end(0)
    launch("time.sleep(3 if role == 'worker' else 0)", '--local', 2, '--timeout', 1).end(0)


def test_a_failed_job_starts_again_with_another_port_and_ends_well(launch, tmp_path):
    job = launch(TELL + """
if me == 'worker1' and sum(name.startswith('toldworker1') for name in os.listdir('.')) < 3:
    os.kill(os.getpid(), signal.SIGKILL)
""", '--local', 2, '--restarts', 2)
    errors = job.end(0)
    assert errors.count('error: worker 1') == 2
    assert 'start 2 of 1 + 2' in errors and 'start 3 of 1 + 2' in errors
    assert len({names['DMLC_PS_ROOT_PORT'] for names in told(tmp_path, 'worker1')}) == 3


def test_restarts_end(launch):
    errors = launch("sys.exit(5) if me == 'worker0' else hang()", '--local', 1, '--restarts', 1).end(5)
    assert errors.count('error: worker 0') == 2


@pytest.mark.parametrize('code', [2, 3])
def test_bad_input_and_a_loss_that_is_not_finite_are_not_tried_again(launch, code):
    errors = launch(f"sys.exit({code}) if me == 'worker0' else hang()", '--local', 1, '--restarts', 3).end(code)
    assert errors.count('error: worker 0') == 1 and 'start 2' not in errors


ONE_HOST_LEFT = """
if os.environ['DMLC_NUM_WORKER'] == '3':
    exec(os.environ['HANG'])
""" + TELL


def test_a_lost_host_is_left_out_of_the_next_start(launch, hosts, tmp_path):
    job = launch(ONE_HOST_LEFT, *hosts, '--restarts', 2, HANG=GRANDCHILDREN + HANG)
    os.kill(parent(job.pids(*ROLES, 'worker2')[-1]), signal.SIGKILL)
    errors = job.end(0)
    assert 'error: host 127.0.0.2 is lost' in errors
    assert 'launch: start 2 of 1 + 2, with 2 workers on localhost\n' in errors
    check_roles(tmp_path, workers=2, servers=1)


def test_nothing_starts_anew_without_the_first_host_which_has_the_run_folder(launch, hosts):
    job = launch(HANG, *hosts, '--restarts', 2)
    os.kill(parent(job.pids('worker0', *ROLES, 'worker2')[0]), signal.SIGKILL)
    errors = job.end(4)
    assert 'error: host localhost is lost' in errors and 'no restart without the first host' in errors
    assert 'start 2' not in errors


def parent(pid):
    with open(f'/proc/{pid}/stat') as file:
        return int(file.read().rpartition(')')[2].split()[1])


@pytest.mark.slow
def test_a_host_that_is_silent_is_lost(launch, hosts, tmp_path):
    job = launch(ONE_HOST_LEFT, *hosts, '--restarts', 2, HANG=HANG)
    os.kill(parent(job.pids(*ROLES, 'worker2')[-1]), signal.SIGSTOP)
    errors = job.end(0)
    assert 'error: host 127.0.0.2 is lost, its agent said nothing for 15 s' in errors
    assert 'launch: start 2 of 1 + 2, with 2 workers on localhost\n' in errors
    check_roles(tmp_path, workers=2, servers=1)


@pytest.mark.slow
def test_a_launcher_that_is_silent_is_given_up(launch):
    job = launch("subprocess.Popen(['yes']) if me == 'worker0' else None\n" + HANG, '--local', 2)
    job.pids(*ROLES)
    job.process.send_signal(signal.SIGSTOP)
    until(lambda: list(job.environments()) == [job.process.pid])
    job.process.send_signal(signal.SIGCONT)
    job.end(4)


@pytest.mark.slow
def test_a_server_that_leaves_before_the_workers_is_a_failure(launch):
    errors = launch("hang() if role != 'server' else None", '--local', 1, leave=False).end(1)
    assert 'error: server 0' in errors and 'ended with exit code 0 before the workers' in errors


@pytest.mark.slow
def test_servers_that_stay_after_the_workers_are_ended(launch):
    launch("hang() if role != 'worker' else None", '--local', 2, leave=False).end(0)


@pytest.mark.slow
def test_a_reader_that_pauses_does_not_end_the_job(launch, tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    body = "print('x' * 1000000) if me == 'worker0' else None"
    job = launch(body, '--local', 1, before=('sh', '-c', 'exec "$@" > pipe', 'sh'))
    with open(tmp_path / 'pipe') as pipe:
        time.sleep(20)
        assert len(pipe.read()) == 1000001
    job.end(0)


def test_a_host_that_cannot_be_reached_is_said_with_the_words_of_ssh(launch, hosts, tmp_path):
    (tmp_path / 'ssh').write_text('#!/bin/sh\necho no route to $1 >&2\nexit 255\n')
    errors = launch('', *hosts, '--restarts', 3).end(2)
    assert errors == 'error: host localhost cannot be reached, its agent ended: no route to localhost\n'


def test_a_login_shell_that_greets_is_no_obstacle(launch, hosts, tmp_path):
    (tmp_path / 'ssh').write_text('#!/bin/sh\nshift\necho welcome\nexec sh -c "$1"\n')
    launch('', *hosts).end(0)


def test_a_port_that_is_taken_is_refused(launch):
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        taken.listen()
        errors = launch('', '--local', 1, '--port', taken.getsockname()[1]).end(2)
    assert errors.startswith('error: port ') and 'in use' in errors and errors.count('\n') == 1


def refusal(*arguments, **environment):
    """The one sentence on stderr."""
    result = subprocess.run([sys.executable, LAUNCH, *map(str, arguments)], capture_output=True, text=True, timeout=60,
                            env=dict(os.environ, **environment))
    assert result.returncode == 2 and result.stderr.startswith('error: ') and result.stderr.count('\n') == 1
    return result.stderr


@pytest.mark.parametrize(('line', 'says'), [
    ('-- ls', 'neither --local N nor --hosts FILE'),
    ('--local 1 --hosts x -- ls', '--local and --hosts'),
    ('--local 1', 'no command'),
    ('--local 1 --', 'no command'),
    ('--local 1 ls', 'unrecognized arguments: ls'),
    ('--local 0 -- ls', 'argument --local: 0 is less than 1'),
    ('--local two -- ls', "'two'"),
    ('--local 1 --servers 0 -- ls', 'argument --servers: 0'),
    ('--local 1 --port 65536 -- ls', 'argument --port: 65536'),
    ('--local 1 --timeout nan -- ls', 'argument --timeout: nan'),
    ('--local 1 --ssh rsh -- ls', '--ssh means nothing with --local'),
    ('--hosts x --ssh " -- ls', 'argument --ssh'),
    ('--local 1 -- no_such_command', 'command not found: no_such_command'),
    ('--hosts no_such_file -- ls', 'no_such_file cannot be read: No such file'),
])
def test_a_bad_command_line_is_refused(line, says):
    assert says in refusal(*line.split())


@pytest.mark.parametrize(('text', 'says'), [
    ('# nothing\n\n', 'names no host'),
    ('a\nb 2 3\n', "line 2: 'b 2 3' is not"),
    ('a two\n', "'a two'"),
    ('a 0\n', "'a 0'"),
    ('-oProxyCommand=ls\n', 'line 1'),
])
def test_a_bad_file_of_hosts_is_refused(tmp_path, text, says):
    (tmp_path / 'hosts').write_text(text)
    assert says in refusal('--hosts', tmp_path / 'hosts', '--', 'ls')


def test_an_unknown_interface_is_refused(launch, hosts):
    errors = launch('', *hosts, '--interface', 'no_such_name').end(2)
    assert 'no interface or address no_such_name' in errors and errors.count('\n') == 1


def test_a_rank_among_several_hosts_needs_the_address_of_the_first():
    ranks = {'OMPI_COMM_WORLD_RANK': '1', 'OMPI_COMM_WORLD_SIZE': '4', 'OMPI_COMM_WORLD_LOCAL_SIZE': '2'}
    assert '--root ADDRESS' in refusal('--', 'ls', **ranks)
    assert 'too few' in refusal('--servers', '3', '--root', '127.0.0.1', '--', 'ls', **ranks)
    assert '--restarts means nothing' in refusal('--restarts', '3', '--', 'ls', **ranks)


@pytest.mark.parametrize(('rank', 'role'), [(0, 'scheduler'), (2, 'server'), (3, 'worker')])
def test_srun_gives_the_role_by_the_rank(rank, role):
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    code = "import json, os; print(json.dumps(dict(os.environ)))"
    output = subprocess.check_output(
        [sys.executable, LAUNCH, '--servers', '2', '--port', str(port), '--', sys.executable, '-c', code], timeout=60,
        env=dict(os.environ, SLURM_PROCID=str(rank), SLURM_NTASKS='5', SLURM_NNODES='1', PORT='1234'))
    names = json.loads(output)
    assert names['DMLC_ROLE'] == role and names['DMLC_PS_ROOT_PORT'] == str(port) and 'PORT' not in names
    assert names['DMLC_NUM_WORKER'] == names['DMLC_NUM_SERVER'] == '2'
    assert names.get('GN_GLUON_WORKER') == ('0' if role == 'worker' else None)


MPIRUN = ['mpirun', '--allow-run-as-root', '--oversubscribe', '-n', '4']


@pytest.mark.skipif(shutil.which('mpirun') is None, reason='Open MPI is not installed')
def test_under_mpirun_each_rank_takes_its_role(launch, tmp_path):
    launch(TELL, before=MPIRUN, PORT='1234').end(0)
    check_roles(tmp_path, workers=2, servers=1)
    assert here(tmp_path) == [('2', '0'), ('2', '1')]


@pytest.mark.skipif(shutil.which('mpirun') is None, reason='Open MPI is not installed')
def test_mpirun_ends_all_when_one_rank_is_killed(launch):
    job = launch(HANG, before=MPIRUN)
    job.pids(*ROLES)
    os.kill(job.pids(*ROLES)[-1], signal.SIGKILL)
    assert job.process.wait(timeout=60)
