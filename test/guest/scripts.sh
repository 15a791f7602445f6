# Runs the end-to-end scripts in the guest; /e2e/run says which.
. /e2e/run
export PATH=/bin HOME=/root BERTH_E2E=1 BERTH_E2E_SLOW=$SLOW BERTH_BIN=/bin BERTH_CACHE=/cache
cd /e2e
# One after the other: software emulation has no time to give away.
exec ./e2e.test -test.v -test.count=1 -test.parallel=1 -test.timeout=$LIMIT -test.run="$RUN"
