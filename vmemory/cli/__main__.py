from vmemory.cli import main

main()
