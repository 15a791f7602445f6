package main

import (
	_ "embed"
	"html/template"
	"log/slog"
	"net/http"
	"strconv"
	"strings"
	"time"
)

//go:embed page.html
var pageText string

// Bounds of what a visitor may write, in bytes.
const (
	maxForm = 8 << 10
	maxName = 40
	maxText = 400
)

// site answers requests.
type site struct {
	title string
	host  string
	store store
}

// page is what the template shows.
type page struct {
	Title   string
	Host    string
	Visits  int64
	Entries []entry
}

func (s *site) routes() http.Handler {
	mux := http.NewServeMux()
	view := template.Must(template.New("page").Funcs(template.FuncMap{
		"when": func(t time.Time) string { return t.UTC().Format("2 January 2006, 15:04") },
	}).Parse(pageText))
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, r *http.Request) { s.show(w, r, view) })
	mux.HandleFunc("POST /sign", s.sign)
	mux.HandleFunc("GET /visits", s.visits)
	mux.HandleFunc("GET /healthz", s.healthz)
	return mux
}

func (s *site) show(w http.ResponseWriter, r *http.Request, view *template.Template) {
	visits, err := s.store.visit(r.Context())
	if err != nil {
		unavailable(w, err)
		return
	}
	entries, err := s.store.entries(r.Context())
	if err != nil {
		unavailable(w, err)
		return
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	if err := view.Execute(w, page{s.title, s.host, visits, entries}); err != nil {
		slog.Warn("page not sent", "error", err)
	}
}

func (s *site) sign(w http.ResponseWriter, r *http.Request) {
	r.Body = http.MaxBytesReader(w, r.Body, maxForm)
	e := entry{
		Name: strings.TrimSpace(r.PostFormValue("name")),
		Text: strings.TrimSpace(r.PostFormValue("text")),
		At:   time.Now(),
	}
	if e.Name == "" || e.Text == "" || len(e.Name) > maxName || len(e.Text) > maxText {
		http.Error(w, "please give a name and a few words", http.StatusBadRequest)
		return
	}
	if err := s.store.add(r.Context(), e); err != nil {
		unavailable(w, err)
		return
	}
	slog.Info("signed", "name", e.Name)
	http.Redirect(w, r, "/", http.StatusSeeOther)
}

// visits counts and prints the number alone, for scripts and load.
func (s *site) visits(w http.ResponseWriter, r *http.Request) {
	n, err := s.store.visit(r.Context())
	if err != nil {
		unavailable(w, err)
		return
	}
	_, _ = w.Write([]byte(strconv.FormatInt(n, 10) + "\n"))
}

func (s *site) healthz(w http.ResponseWriter, r *http.Request) {
	if err := s.store.ready(r.Context()); err != nil {
		unavailable(w, err)
		return
	}
	_, _ = w.Write([]byte("ok\n"))
}

func unavailable(w http.ResponseWriter, err error) {
	slog.Warn("store unavailable", "error", err)
	http.Error(w, "the store does not answer; try again in a moment", http.StatusServiceUnavailable)
}
