"""The back end vLLM: whole engines, and prefill and decode engines, of unmodified vLLM over one copy of the memory."""
