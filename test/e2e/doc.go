// Package e2e runs scripts that a user could type against real executables with real clients.
//
// Every script in testdata/script runs in network, mount and PID namespaces of its own with an
// instance (--root) of its own, so scripts run side by side, cannot meet the host's containers or
// firewall, and cannot leave a process behind. The scripts are testscript archives; the commands
// that the harness adds are documented in commands_test.go.
//
// TestSurvive kills the instance's own processes at 200 seeded instants under load and compares
// what /proc, the logs and the clients saw with what should be; TestSoak does so for a time.
//
//	make e2e                  # all of them
//	make e2e RUN=Script/logs  # those whose name begins so
//	make e2e V=1              # with every command's output
//	make e2e RUN=Survive      # BERTH_SEED=N repeats a run, BERTH_INSTANTS=N changes its length
//	make soak SOAK=1h
package e2e
