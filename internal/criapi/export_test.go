package criapi

// For tests of what no client reaches.
var (
	Code         = code
	DialInside   = dialInside
	ObjectName   = objectName
	StopSignal   = stopSignal
	CRISignal    = criSignal
	Credentials  = credentials
	CommandOf    = command
	MaxNameBytes = maxNameBytes
)
