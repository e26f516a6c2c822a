from dlkern.bench.runner import main

raise SystemExit(main())
