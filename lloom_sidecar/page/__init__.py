"""The status page (:4882) and the chat page (/chat on :4880): what a node shows to a person with a browser."""
