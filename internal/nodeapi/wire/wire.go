// Package wire holds the JSON shapes of Berth's own routes under /berth/v1/, which package
// nodeapi serves and the command line reads. It imports the standard library only, so that the
// command line stays small.
package wire

import "time"

// Prefix of all routes.
const Prefix = "/berth/v1"

// Error is the body of every failed answer. Kind is the name of an errdefs kind, "" for an
// internal error.
type Error struct {
	Kind    string `json:"kind"`
	Message string `json:"message"`
}

// Explanation answers "why" in words: GET explain/{name}.
type Explanation struct {
	Subject string   `json:"subject"`
	Summary string   `json:"summary"`
	Details []string `json:"details,omitempty"`
	Hints   []string `json:"hints,omitempty"`
}

// Status are the facts of a running node: GET status.
type Status struct {
	Node       string     `json:"node"`
	Version    string     `json:"version"`
	PID        int        `json:"pid"`
	Root       string     `json:"root"` // state directory
	Run        string     `json:"run"`  // run directory
	Started    time.Time  `json:"started"`
	ReadyMS    float64    `json:"readyMilliseconds"` // from the process's start until it served
	Sockets    []string   `json:"sockets"`
	Containers Containers `json:"containers"`
	Sandboxes  int        `json:"sandboxes"`
	Images     int        `json:"images"`
	Processes  []Process  `json:"processes,omitempty"`
}

// Containers counts containers by what they do.
type Containers struct {
	Total      int `json:"total"`
	Running    int `json:"running"`
	Paused     int `json:"paused"`
	Restarting int `json:"restarting"`
	Stopped    int `json:"stopped"`
}

// Process is one process of the instance.
type Process struct {
	Name     string    `json:"name"`
	PID      int       `json:"pid"`
	Version  string    `json:"version,omitempty"`
	Started  time.Time `json:"started,omitzero"`
	Restarts int       `json:"restarts"`
	RSSBytes int64     `json:"rssBytes"`
}

// Down tells what POST down did.
type Down struct {
	Stopped int `json:"stopped"` // containers
}
