from pi_dist.cli import main

main()
