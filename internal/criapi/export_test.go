package criapi

// For tests in package criapi_test.

var (
	DialInside = dialInside
	ObjectName = objectName
)
