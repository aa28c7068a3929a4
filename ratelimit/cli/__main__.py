import sys

from ratelimit.cli import main

sys.exit(main())
