package logs

// SetHook installs a hook that is asked before each change to a file: op is "write",
// "checkpoint", "rename", "remove" or "truncate". When it fails only n bytes of b are written.
func (r *Renderer) SetHook(f func(op string, b []byte) (n int, err error)) { r.hook = f }

// Formats, for tests and fuzzing.
var (
	AppendEntry = appendEntry
	ParseEntry  = parseEntry
)

// Exported bounds.
const MaxPiece = maxPiece
