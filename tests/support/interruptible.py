"""A program that Ctrl-C ends, however the tests were started."""

INTERRUPTIBLE = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "import runpy; runpy.run_module('nodeagent', run_name='__main__', alter_sys=True)"
)
"""The command line, for `python -c`, also where a shell started the tests in the background: their children ignore
SIGINT then."""
