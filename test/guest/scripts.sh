# Runs the end-to-end scripts in the guest; /e2e/run says which. One after the other: software
# emulation has no time to give away. What a script printed is shown when it fails.
. /e2e/run
export PATH=/bin HOME=/root BERTH_E2E=1 BERTH_E2E_SLOW=$SLOW BERTH_E2E_LIMIT=$LIMIT BERTH_BIN=/bin BERTH_CACHE=/cache
cd /e2e
status=0
for name in $SCRIPTS; do
	begun=$(date +%s)
	if ./e2e.test -test.v=$VERBOSE -test.count=1 -test.run="^TestScript$/^$name$" >/tmp/out 2>&1; then
		[ $VERBOSE = false ] || cat /tmp/out
		echo "script PASS: $name ($(($(date +%s) - begun)) s)"
	else
		cat /tmp/out
		echo "script FAIL: $name ($(($(date +%s) - begun)) s)"
		status=1
	fi
done
exit $status
