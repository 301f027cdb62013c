"""What a chat template may use for one conversation. Real ones need a hundredth of it."""

SECONDS = 2.0  # of the CPU; on a busy machine that is longer by the clock
WAIT_SECONDS = 60.0  # by the clock
MEMORY_BYTES = 512 << 20
OUTPUT_CHARACTERS = 16 << 20
LOOPS = 1_000_000  # turns of all its loops together
SOURCE_CHARACTERS = 1 << 20
